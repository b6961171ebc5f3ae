"""The release: what its files hold, and that their versions agree."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from tests import distributions

ROOT = pathlib.Path(__file__).parent.parent.parent


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


@pytest.mark.slow
def test_built_distributions_have_their_files(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    assert distributions.main(tmp_path) == 0
