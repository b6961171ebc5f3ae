"""The README's Python runs, and its commands name files that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippet_runs(snippet, torchvision):
    exec(compile(snippet, "README.md", "exec"), {})


def test_named_files_exist():
    for name in re.findall(r"(?:configs|benchmarks|vgg_jax|tests)/[\w/]+\.(?:py|md)", README):
        assert (ROOT / name).exists(), name
