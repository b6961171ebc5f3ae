"""The reference has every public name, and its examples run."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import vgg_jax
from tests.narrow import NARROW_TABLE
from vgg_jax import features
from vgg_jax.features import explain
from vgg_jax.network import Network

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in sorted((DOCS / "reference").glob("*.md"))}
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:data):: (\S+)$", re.MULTILINE)
DOCUMENTED = sorted({name for text in PAGES.values() for name in DIRECTIVE.findall(text)})
WITHOUT_EXAMPLE = {  # they need a repository of the hub or photographs, or change the process
    "vgg_jax.Network.push_to_hub",
    "vgg_jax.export.hub.push",
    "vgg_jax.export.onnx_int8.write_int8",
    "vgg_jax.runtime.configure",
    "vgg_jax.runtime.silence_libraries",
}


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def resolve(name):
    """Return the object with a full name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = inspect.getattr_static(found, part, None) or getattr(found, part)
        return found
    raise AssertionError(name)


def function_of(found):
    """Return the function of an object, or None."""
    found = found.fget if isinstance(found, property) else found
    return found if inspect.isfunction(found) else None


SHORT = ("configuration.md", "index.md", "weights.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page in SHORT else pytest.mark.slow)
        for page, text in PAGES.items()
        if snippets(text)
    ],
)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(snippets(PAGES[page]))
    if page == "runtime.md":  # it changes settings of the process
        environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return
    if page != "features.md":  # the heads of LPIPS have the paper's channels
        monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
    exec(compile(code, page, "exec"), {"__name__": "page"})


def test_every_public_name_is_documented():
    public = {f"vgg_jax.{name}" for name in vgg_jax.__all__} - {"vgg_jax.features", "vgg_jax.__version__"}
    public |= {f"vgg_jax.features.{name}" for name in features.__all__} - {"vgg_jax.features.explain"}
    public |= {
        f"vgg_jax.features.explain.{name}"
        for name, found in vars(explain).items()
        if inspect.isfunction(found) and found.__module__ == explain.__name__ and not name.startswith("_")
    }
    public |= {
        f"vgg_jax.Network.{name}"
        for name, found in vars(Network).items()
        if inspect.isfunction(found) and (not name.startswith("_") or name == "__call__")
    }
    assert not sorted(public - set(DOCUMENTED))


def test_names_that_guides_import_are_documented():
    """What a guide imports is public."""
    last = {name.rpartition(".")[2] for name in DOCUMENTED}
    imported = set()
    for path in [*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.md"), DOCS.parent / "README.md"]:
        for names in re.findall(r"^from vgg_jax[\w.]* import (.*)$", path.read_text(), re.MULTILINE):
            imported |= set(names.split(", "))
    assert len(imported) > 20
    assert not sorted(imported - last - {"features", "explain"})


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_name_has_arguments_and_example(name):
    found = resolve(name)
    text = inspect.getdoc(found) or ""
    function = function_of(found)
    if function:
        parameters = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name not in ("self", "key") and parameter.kind is not parameter.VAR_KEYWORD
        ]
        missing = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", text)]
        assert not missing, f"{name} does not describe {missing}"
    if name not in WITHOUT_EXAMPLE:
        page = next(text for text in PAGES.values() if name in DIRECTIVE.findall(text))
        word = {"__call__": "("}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        assert any(word in snippet for snippet in snippets(page)), f"{name} has no example"
