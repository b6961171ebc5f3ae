"""The experiments on CIFAR-10 refuse a wrong folder before they start anything."""

import importlib
import sys

import pytest

from experiments.cifar10_runs import data_folder

EXPERIMENTS = (
    "cifar10_comparison",
    "cifar10_final",
    "cifar10_plain",
    "cifar10_search",
    "int8",
    "interruptions",
    "probe",
    "transfer_cifar10",
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_wrong_folder_gives_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "train").mkdir()
    runs = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path), "--runs-dir", str(runs), "--out", str(runs)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"experiments.{name}").main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert last == (
        f"{name}.py: error: argument data: {tmp_path} holds no folder test; "
        "expected train/CLASS/IMAGE and test/CLASS/IMAGE; correct the path"
    )
    assert not runs.exists()


def test_folder_of_both_splits_is_accepted(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    assert data_folder(str(tmp_path)) == str(tmp_path)
