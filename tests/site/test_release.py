"""The release: what its files hold, and that their versions agree."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from tests import distributions

ROOT = pathlib.Path(__file__).parent.parent.parent
WITHOUT_PATH = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
TEXT = {"capture_output": True, "text": True, "env": WITHOUT_PATH}


@pytest.fixture
def release_version():
    spec = importlib.util.spec_from_file_location("release_version", ROOT / ".ci" / "release_version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_and_stray_files_are_named():
    names = distributions.expected_in_wheel() | {"vgg_jax-0.2.0.dist-info/METADATA"}
    assert not distributions.wheel_problems(names)
    (problem,) = distributions.wheel_problems(names - {"vgg_jax/py.typed"})
    assert problem == "the wheel lacks vgg_jax/py.typed"
    (problem,) = distributions.wheel_problems(names | {"tests/narrow.py"})
    assert problem == "the wheel has tests/narrow.py, which does not belong there"


def test_tag_of_another_version_is_refused(release_version, tmp_path, monkeypatch, capsys):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("title: vgg_jax\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2026-12-01)\n\n## 0.1.0\n")
    monkeypatch.setattr(release_version, "ROOT", tmp_path)
    assert release_version.main("v0.2.0") == 0
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    assert release_version.main("v0.2.0") == 1
    assert "CHANGELOG.md has version 'Unreleased'; expected '0.2.0'" in capsys.readouterr().err


def test_set_version_is_consistent(release_version, tmp_path, monkeypatch):
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(release_version, "ROOT", tmp_path)
    assert release_version.main("--set", "0.9.0", "2026-12-01") == 0
    assert release_version.main("v0.9.0") == 0
    assert "date-released: 2026-12-01\n" in (tmp_path / "CITATION.cff").read_text()
    assert "\n## 0.9.0 (2026-12-01)\n" in (tmp_path / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("words", [("0.9", "2026-12-01"), ("0.9.0", "1 December"), ("0.9.0", "2026-12-01")])
def test_release_without_a_place_changes_nothing(release_version, tmp_path, monkeypatch, words):
    texts = {"pyproject.toml": 'version = "0.1.0"\n', "CITATION.cff": "version: 0.1.0\n", "CHANGELOG.md": "## 0.1.0\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(release_version, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="expected"):
        release_version.main("--set", *words)
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


USERS_PROGRAM = """
import jax
from vgg_jax import CIFAR10, VGG, Network, load

model = VGG(depth=11, num_classes=2, pool_size=1, hidden=())
variables = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
Network(model, variables, CIFAR10, classes=("cat", "dog")).save("small.safetensors")
net: Network = load("small.safetensors")
for prediction in net.predict(["photo.jpg"], top=2):
    print(prediction.names[0].upper(), float(prediction.probabilities[0]))
height: int = net.features(["photo.jpg"], layers=("relu1_2",))["relu1_2"].shape[1]
"""


@pytest.mark.slow
def test_users_program_is_typed_against_the_wheel(tmp_path):
    """The wheel is installed; the packages that it depends on are those of this environment."""
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", wheels, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python, (wheel,) = venv / "bin" / "python", wheels.glob("*.whl")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, **TEXT)
    (own,) = venv.glob("lib/python*/site-packages")
    (own / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run([python, "-c", "import vgg_jax; print(vgg_jax.__file__)"], cwd=tmp_path, **TEXT)
    assert where.stdout.startswith(str(own)), where
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python]
    (tmp_path / "right.py").write_text(USERS_PROGRAM)
    ran = subprocess.run([*mypy, "right.py"], cwd=tmp_path, **TEXT)
    assert "Success: no issues found in 1 source file" in ran.stdout, ran
    (tmp_path / "wrong.py").write_text(USERS_PROGRAM.replace("depth=11", "depth='eleven'"))
    assert 'has incompatible type "str"' in subprocess.run([*mypy, "wrong.py"], cwd=tmp_path, **TEXT).stdout


@pytest.mark.slow
def test_built_distributions_have_their_files(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    assert distributions.main(tmp_path) == 0
