"""Errors of a user and imports of optional packages."""

import sys

import pytest

from tests.conftest import raises_user_error
from vgg_jax.errors import UserError, first_line, report_mistakes, require


def test_require_returns_the_module():
    assert require("json.decoder", "test").JSONDecoder


@pytest.mark.parametrize("module", ["vgg_jax_missing", "vgg_jax_missing.part"])
def test_missing_package_is_named_with_the_pip_command(module):
    with raises_user_error("vgg_jax_missing is not installed: pip install 'vgg_jax[digits]'"):
        require(module, "digits")


def test_package_that_lacks_another_names_the_other(tmp_path, monkeypatch):
    (tmp_path / "vgg_jax_optional.py").write_text("import vgg_jax_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    with raises_user_error("vgg_jax_missing is not installed"):
        require("vgg_jax_optional", "digits")


def test_broken_package_is_reported_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "vgg_jax_broken.py").write_text("raise ImportError('libbroken.so: wrong version')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with raises_user_error("vgg_jax_broken cannot be imported (libbroken.so: wrong version): pip install"):
        require("vgg_jax_broken", "digits")
    assert "vgg_jax_broken" not in sys.modules


def test_first_line_shortens_the_middle_of_long_messages():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    line = first_line(ValueError("a" * 200 + "b" * 200))
    assert line.startswith("aaa") and line.endswith("bbb") and len(line) < 210


def test_exit_codes_and_messages_of_commands(capsys):
    def fail(error):
        raise error

    assert report_mistakes("train", lambda: 3) == 3
    assert report_mistakes("train", lambda: fail(KeyboardInterrupt())) == 130
    assert report_mistakes("train", lambda: fail(UserError("one\ntwo"))) == 2
    assert capsys.readouterr().err == "train: error: one\ntrain: error: two\n"
