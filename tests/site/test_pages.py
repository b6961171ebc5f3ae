"""The pages of the site: they name lines, commands and options that exist."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import matplotlib.figure
import pytest

from docs import architecture, directives
from vgg_jax.__main__ import SUBCOMMANDS
from vgg_jax.model import TABLE_1

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(path for folder in (".", "benchmarks", "experiments") for path in sorted((ROOT / folder).glob("*.md"))),
]


def lines_without_indent(text):
    return [line.strip() for line in text.strip().splitlines()]


def test_lines_beside_the_paper_are_in_the_files():
    text, checked = (ROOT / "docs" / "paper.md").read_text(), 0
    path = ""
    for file, block in re.findall(
        r"`((?:vgg_jax|configs)/[\w/]+\.py)`|^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        if file:
            path = file
            continue
        wanted, found = lines_without_indent(block), lines_without_indent((ROOT / path).read_text())
        starts = [i for i, line in enumerate(found) if line == wanted[0]]
        assert any(found[i : i + len(wanted)] == wanted for i in starts), f"{path} lacks {wanted[0]!r}"
        checked += 1
    assert checked > 15


def test_open_measurements_are_on_one_page():
    folders = ("vgg_jax", "configs", "benchmarks", "experiments")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in [*PAGES, *code] if "not yet measured" in words_of(path)}
    assert found == {"docs/benchmarks.md"}


def words_of(path):
    """Return the words of a file in small letters, with one blank between them."""
    return " ".join(path.read_text().lower().replace("#", " ").split())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_command_reference_has_every_option(name):
    assert f"```{{command}} {name}\n" in (ROOT / "docs/reference/commands.md").read_text()
    lines = "\n".join(directives.train_lines() if name == "train" else directives.command_lines(name))
    if name == "train":
        assert "`--workdir`" in lines and "`--local_device_ids`" in lines and "`--helpfull`" not in lines
        return
    for action in directives.parser_of(name)._actions:
        for flag in action.option_strings:
            assert flag in ("-h", "--help") or f"`{flag}" in lines, flag


def test_configuration_reference_has_every_group():
    text = (ROOT / "docs/reference/configuration.md").read_text()
    rows = [line for title in re.findall(r"{config-fields} (\w+)", text) for line in directives.field_lines(title)]
    for field in ("`batch_size`", "`model.depth`", "`data.dataset`", "`optimizer.learning_rate`"):
        assert any(row.startswith(f"| {field} |") for row in rows), field


def documented_commands():
    """Return the commands of the shell blocks of all pages, without variables and placeholders, and their pages."""
    for path in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"(?:vgg-jax|python -m vgg_jax) ([a-z-]+) (.*)", line.partition("  #")[0].strip())
                if match and match.group(1) in SUBCOMMANDS and match.group(1) != "train":
                    yield path.name, match.group(1), shlex.split(match.group(2))


def test_documented_commands_can_be_parsed(capsys):
    problems, count = [], 0
    for page, name, words in documented_commands():
        count += 1
        try:
            directives.parser_of(name).parse_args(words)
        except SystemExit:
            problems.append(f"{page}: vgg-jax {name} {shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
    assert count > 20
    assert not problems, "\n".join(problems)


def test_picture_of_the_columns_has_every_layer():
    figure = matplotlib.figure.Figure()
    architecture.draw_columns(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum(text.startswith("conv") for text in texts) == sum(map(len, sum(TABLE_1.values(), ())))
    assert texts.count("conv 1x1, 512") == 2 and texts.count("LRN") == 1


@pytest.mark.slow
def test_quickstart_reaches_its_results(tmp_path):
    """Run the blocks of the quickstart in order, with one epoch in place of twelve."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    train = "train --config digits --workdir runs/digits"
    assert f"vgg-jax {train}\n" in text
    words = [*train.split(), f"--config.data.data_dir={tmp_path}", "--config.num_epochs=2"]
    for command in (["-m", "vgg_jax", *words], ["page.py"]):
        ran = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert "digit2.png" in ran.stdout
    assert (tmp_path / "digits.safetensors").exists()


@pytest.mark.slow
def test_site_builds_with_executed_notebooks(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--execute", tmp_path], check=True)
    assert "<img" in (tmp_path / "docs" / "notebooks" / "grad_cam.html").read_text()
