"""`python -m vgg_jax prepare`: the data sets, and one line for each mistake."""

import sys

import pytest

from tests.conftest import write_cifar10
from tests.data.archives import records
from vgg_jax.cli import prepare
from vgg_jax.data.prepare import digits


@pytest.fixture(autouse=True)
def no_network_and_no_tensorflow(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody answers here
    yield
    assert "tensorflow" not in sys.modules  # no code under test has imported it


def test_prepare_writes_the_digits_and_reports_mistakes(tmp_path, capsys):
    assert prepare.main(["digits", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"digits is in {tmp_path}"
    assert len(records(tmp_path, "digits", "test")) == digits.NUM_TEST
    for name, expected in (
        ("nosuchdata", "'nosuchdata' cannot be opened as a data set of TFDS"),
        ("", "'' cannot be opened as a data set of TFDS"),
        ("cifar10:9.9.9", "'cifar10:9.9.9' cannot be opened as a data set of TFDS"),
        ("imagenette", "TFDS needs TensorFlow to prepare imagenette, and tensorflow is not installed: pip install"),
        ("imagenet2012", "ILSVRC2012_img_val.tar is missing"),
    ):
        assert prepare.main([name, "--data-dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_tfrecord_copy_is_not_taken_for_a_prepared_one(tmp_path, capsys):
    write_cifar10(str(tmp_path), num_train=10, num_test=10)
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    assert "is in tfrecord format; expected array_record" in capsys.readouterr().err
