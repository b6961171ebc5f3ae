"""The script that follows pages on a fresh machine finds their blocks and compares their figures."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def fresh_machine():
    spec = importlib.util.spec_from_file_location("fresh_machine", ROOT / ".ci" / "fresh_machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_begins_with_its_installation(fresh_machine):
    for name in fresh_machine.PAGES:
        install, rest = fresh_machine.split(fresh_machine.blocks((ROOT / "docs" / f"{name}.md").read_text()))
        assert [block.kind for block in install] == ["sh"], name
        assert "python3 -m venv .venv\n" in install[0].text and "pip install 'vgg_jax[" in install[0].text, name
        assert len(rest) > 2, name


def test_blocks_keep_their_order(fresh_machine):
    page = "```sh\npip install a\n```\ntext\n```python\nx = 1\n```\n```text\nno\n```\n```{code-cell} ipython3\ny\n```\n"
    found = fresh_machine.blocks(page)
    assert found == [("sh", "pip install a\n"), ("python", "x = 1\n"), ("cell", "y\n")]
    assert fresh_machine.notebook(found[2:])["cells"][0]["source"] == "y\n"


def test_lower_figure_than_stated_fails(fresh_machine):
    assert fresh_machine.figure_of("quickstart", "accuracy 12.00%\naccuracy  99.17%") == "accuracy 99.17%"
    for output in ("accuracy 98.00%", "no figure"):
        with pytest.raises(SystemExit, match=r"expected at least 98\.88%"):
            fresh_machine.figure_of("quickstart", output)
    assert "99.44 %" in (ROOT / "docs" / "quickstart.md").read_text()
