"""The README's Python runs, and its commands name files that exist."""

import pathlib
import re
import sys

import pytest

from vgg_jax import convert

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


def test_snippets_run_one_after_the_other(torchvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (1, 1000)
    assert namespace["style"].shape == (1, 256, 256)
    assert namespace["gradient"].any()
    assert int(namespace["state"].step) == 1

    (arguments,) = re.findall(r"^python -m vgg_jax.convert (.*)$", README, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["convert", *arguments.split()])  # here, where torchvision can be imported
    assert convert.main() == 0
    assert (tmp_path / "vgg11.pth").exists()


@pytest.mark.parametrize("path", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*.py"))])
def test_named_files_exist(path):
    for name in re.findall(
        r"(?:configs|benchmarks|vgg_jax|tests)/(?!NAME)[\w/]+\.(?:py|md|jpg)", (ROOT / path).read_text()
    ):
        assert (ROOT / name).exists(), name


def test_the_tests_it_names_are_there():
    """The table of what a run survives, in particular."""
    named = set(re.findall(r"`(test_\w+)`", README))
    code = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    missing = [name for name in named if f"def {name}(" not in code]
    assert len(named) > 20
    assert not missing
