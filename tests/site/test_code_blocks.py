"""Every code block of the pages is run: by a test, by the build of the site, or by the commands of this file.

Blocks of Python run. Commands that need hours, a download or the data of a reader are parsed: their programs, options
and values exist.
"""

import argparse
import pathlib
import re
import runpy
import shlex
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

from docs import directives
from tests import test_readme
from tests.conftest import random_variables
from tests.narrow import NARROW_TABLE
from tests.site import test_reference
from vgg_jax import IMAGENET, VGG, Network, to_torch
from vgg_jax.__main__ import SUBCOMMANDS
from vgg_jax.cli import train
from vgg_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDERS = (".", "docs", "docs/notebooks", "docs/reference", "benchmarks", "experiments")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for name in FOLDERS for path in sorted((ROOT / name).glob("*.md"))
}
FENCE = re.compile(r"^( *)```(\S[^\n]*)?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# Blocks that are no program: lines beside the paper, which test_pages.py compares, printed lines, a citation.
WITHOUT_PROGRAM = ("py", "text", "bibtex", "")
# Programs of others, and those that have no parser of options.
OTHERS = {
    "git clone",
    "pip install",
    "pre-commit install",
    "twine check",
    "python -m build",
    "python -m pytest",
    "python -m tests.distributions",
    "python -m tests.mutants",
    "python docs/pictures.py",
    ".ci/run",
}


def blocks(kind):
    """Return the pages and the texts of all blocks of a kind."""
    return [(page, text) for page, whole in PAGES.items() for _, found, text in FENCE.findall(whole) if found == kind]


def commands():
    """Return the pages and the commands of all blocks of shell commands, without comments and variables."""
    found = []
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    del words[0]
                if words:
                    words[0] = re.sub(r"^(\.venv/bin/)?(python|pip)3?$", r"\2", words[0])
                    found.append((page, words))
    return found


def test_every_block_has_a_known_kind():
    kinds = {kind for text in PAGES.values() for _, kind, _ in FENCE.findall(text)}
    assert kinds - {kind for kind in kinds if kind.startswith("{")} <= {
        "python",
        "python no-run",
        "sh",
        *WITHOUT_PROGRAM,
    }
    for page, text in PAGES.items():
        fences = len(re.findall(r"^ *```", text, re.MULTILINE))
        assert fences == 2 * len(FENCE.findall(text)), f"{page} has a fence without its end"


def test_every_page_with_python_is_run():
    """A new page runs in test_readme.py; the others are named there with the tests that run them."""
    run = {"README.md", *(f"docs/{name}" for name in test_readme.PAGES if name not in test_readme.RUN_ELSEWHERE)}
    run |= {f"docs/reference/{name}" for name in test_reference.PAGES}
    assert {page for page, _ in blocks("python")} <= run | {f"docs/{name}" for name in test_readme.RUN_ELSEWHERE}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_readme.py")
    missing = [name for name in test_readme.RUN_ELSEWHERE if f'run_page("{name}"' not in tests]
    assert missing == ["quickstart.md"]  # test_quickstart_reaches_its_results runs it
    assert {page for page, _ in blocks("{code-cell} ipython3")} == {page for page in PAGES if "/notebooks/" in page}


@pytest.mark.slow
def test_python_that_needs_downloads_runs_too(torchvision, tmp_path, monkeypatch):
    """The marked blocks run with a narrow network in the cache and a checkpoint of a narrow network."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    model = VGG(depth=16, batch_norm=True, pool_size=1, hidden=())
    variables = random_variables(model, 32, 32, 3)
    Network(model, variables, IMAGENET).save("vgg16_bn.safetensors")
    arrays = {f"module.{name}": torch.tensor(np.asarray(array)) for name, array in to_torch(model, variables).items()}
    torch.save({"state_dict": arrays, "epoch": 90}, "checkpoint.pth")
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/other.jpg"):
        Image.effect_noise((300, 260), 90).convert("RGB").save(name)
    found = blocks("python no-run")
    assert sorted(page for page, _ in found) == ["README.md", "docs/weights.md"]
    names = {}
    for page, text in found:
        exec(compile(text, page, "exec"), names)
    assert names["net"].model == model and names["prediction"].image == "photos/other.jpg"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of absl, which reads the configuration
def test_commands_that_train_can_be_parsed():
    found = [(page, words) for page, words in commands() if subcommand(words) == "train"]
    assert len(found) > 15
    for page, words in found:
        arguments = words[words.index("train" if "train" in words else "train.py") + 1 :]
        try:
            train._parse(arguments)
        except UserError as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


def subcommand(words):
    """Return the subcommand of vgg_jax that words are, or None."""
    if words[:2] == ["python", "train.py"]:
        return "train"
    for start in (["vgg-jax"], ["python", "-m", "vgg_jax"]):
        if words[: len(start)] == start:
            return words[len(start)]
    return None


class Parsed(BaseException):
    """End a program after its options have been parsed."""


@pytest.fixture
def ends_after_parsing(monkeypatch):
    """End each program once it has parsed its options."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*arguments):
        parse(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)


def test_scripts_of_the_pages_can_be_parsed(ends_after_parsing, monkeypatch):
    found = {tuple(words) for _, words in commands() if words[0] == "python" and words[1].endswith(".py")}
    found = {words for words in found if words[1] != "train.py" and " ".join(words[:2]) not in OTHERS}
    assert len(found) >= 8
    for _, script, *words in sorted(found):
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def test_no_command_is_left_out():
    parsed = 0
    for page, words in commands():
        name = subcommand(words)
        if name is not None:
            assert name in SUBCOMMANDS, f"{page}: {shlex.join(words)}"
            parsed += 1
            continue
        script = words[0] == "python" and words[1].endswith(".py") and (ROOT / words[1]).exists()
        start = " ".join(words[: 3 if "-m" in words[:2] else 2])
        venv = words in (["python", "-m", "venv", ".venv"], [".", ".venv/bin/activate"])
        assert script or venv or start in OTHERS or words[0] in OTHERS, f"{page}: nothing checks {shlex.join(words)}"
    assert parsed > 40


def test_installed_extras_exist():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    named = re.findall(r"(?:vgg_jax|\.)\[([a-z,]+)\]'", "".join(PAGES.values()))
    assert len(named) > 20
    assert {extra for names in named for extra in names.split(",")} <= extras


def test_commands_within_sentences_can_be_parsed(capsys):
    """Sentences may leave out required arguments; options, choices and the number of arguments must exist."""
    problems, count = [], 0
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            words = shlex.split(code) if re.match(r"(vgg-jax|python -m vgg_jax) [a-z]", code) else []
            name = subcommand(words) if words else None
            if name in (None, "train"):
                continue
            count += 1
            parser = directives.parser_of(name)
            for group in (*parser._actions, *parser._mutually_exclusive_groups):
                group.required = False
            for action in parser._get_positional_actions():
                action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)
            try:
                parser.parse_args(words[words.index(name) + 1 :])
            except SystemExit:
                problems.append(f"{page}: {code}: {capsys.readouterr().err.splitlines()[-1]}")
    assert count > 15
    assert not problems, "\n".join(problems)
