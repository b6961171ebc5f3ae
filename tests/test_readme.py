"""The Python of README.md and docs/ runs, and what they name exists."""

import pathlib
import re

import pytest

from docs import fields
from tests.narrow import NARROW_TABLE
from vgg_jax.cli import convert

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README} | PAGES


def snippets(text):
    """Return the Python snippets of a page, except those marked `python no-run`."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def readme(torchvision, tmp_path_factory):
    """Run the README's snippets one after the other; return their names and the folder with their files."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(README), folder


def run(text):
    namespace = {}
    for snippet in snippets(text):
        exec(compile(snippet, "snippet", "exec"), namespace)
    return namespace


def test_readme_snippets_run(readme):
    assert len(snippets(README)) >= 3
    assert readme[0]["logits"].shape == (1, 1000)
    assert readme[0]["class_scores"].shape == (1, 10)
    assert len(readme[0]["predictions"][0].names) == 5


LONG_PAGES = ("embeddings.md", "explaining.md", "fast_convolutions.md", "features.md", "performance.md")
# tests/export and tests/weights run these pages, with narrow networks, a server and other programs.
# tests/site runs the quickstart, which needs the run that it trains.
RUN_ELSEWHERE = ("hub.md", "keras.md", "nnx.md", "quickstart.md", "stablehlo.md")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG_PAGES else ())
        for name, text in PAGES.items()
        if snippets(text) and name not in RUN_ELSEWHERE
    ],
)
def test_page_snippets_run(name, readme, monkeypatch):
    monkeypatch.chdir(readme[1])
    text = PAGES[name]
    if name == "performance.md":  # a step of the whole network compiles for long
        monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        text = text.replace("(64, 32, 32, 3)", "(2, 32, 32, 3)").replace("arange(64)", "arange(2)")
        text = text.replace("depth=16", "depth=11")
    if name == "onnx.md":
        monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
    namespace = run(text)
    if name == "performance.md":
        assert namespace["logits"].shape == (2, 10)
        assert namespace["loss"] > 0
    if name == "features.md":
        assert namespace["style"].shape == (1, 256, 256)
        assert namespace["gradient"].any()
    if name == "training.md":
        assert int(namespace["state"].step) == 1
    if name == "onnx.md":
        assert namespace["probabilities"].shape == (5, 10)
        assert namespace["side"] == 32
        assert max(namespace["error"], namespace["difference"]) < 1e-4
    if name == "evaluation.md":
        assert namespace["scores"].shape == (1, 1000)


def test_few_snippets_are_left_out():
    everything = "".join(TEXTS.values())
    assert len(snippets(everything)) >= 10
    assert everything.count("```python") - len(snippets(everything)) <= 2


def test_readme_convert_command_runs(readme, monkeypatch):
    monkeypatch.chdir(readme[1])
    (arguments,) = re.findall(r"^python -m vgg_jax convert (.*)$", README, re.MULTILINE)
    assert convert.main(arguments.split()) == 0  # in this process, in which torchvision can be imported
    assert (readme[1] / "vgg11.pth").exists()


DOCUMENTED = [
    *(
        str(path.relative_to(ROOT))
        for folder in ("configs", "experiments")
        for path in (ROOT / folder).glob("*.*")
        if path.suffix not in (".jpg", ".png")
    ),
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")),
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTED)
def test_named_files_exist(path):
    text = (ROOT / path).read_text()
    folders = "configs|benchmarks|examples|experiments|docs|vgg_jax|tests"
    for name in re.findall(rf"(?<![\w/])(?:{folders})/(?!NAME)[\w/]+\.(?:py|md|jpg|png)", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", [path for path in DOCUMENTED if path.endswith(".md")])
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / path).read_text()):
        file, _, anchor = target.partition("#")
        linked = (ROOT / path).parent / file if file else ROOT / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings], target


def test_named_tests_exist():
    """In particular those of docs/fault_tolerance.md."""
    named = set(re.findall(r"`(test_\w+)`", "".join(TEXTS.values())))
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in named if f"def {name}(" not in code]
    assert len(named) > 20
    assert not missing


def test_field_reference_is_current():
    assert fields.updated(PAGES["training.md"]) == PAGES["training.md"], "run `python docs/fields.py`"


def test_searches_lead_to_a_page():
    """A reader who searches for the field's words finds the page."""
    searches = {
        "gradient accumulation": "training.md",
        "mixed precision": "training.md",
        "frozen layers": "training.md",
        "resume with another batch size": "training.md",
        "before the ReLU": "features.md",
        "`module.`": "weights.md",
        "Eight GPUs": "distributed.md",
        "dense evaluation": "evaluation.md",
        "horizontal flip": "data.md",
        "linear scaling": "training.md",
        "rematerialization": "training.md",
        "Grad-CAM": "explaining.md",
        "receptive field": "backbones.md",
    }
    missing = [search for search, page in searches.items() if search.lower() not in PAGES[page].lower()]
    assert not missing
