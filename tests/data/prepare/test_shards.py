"""A data set is complete or absent, after kills, on full disks and with several processes at once."""

import os
import subprocess
import sys

import pytest

from tests.cli.test_train import ROOT
from tests.conftest import raises_user_error
from tests.data.archives import assert_same_records, records
from vgg_jax.data.prepare import digits


def rename_but_the_last(source, target):
    if target.endswith("1.0.0"):
        raise KeyboardInterrupt
    os.replace(source, target)


def test_stopped_preparation_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:  # at the very last moment
        broken.setattr(os, "rename", rename_but_the_last)
        with pytest.raises(KeyboardInterrupt):
            digits.prepare(str(tmp_path))
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(records(tmp_path, "digits", "test")) == 360
    assert set(os.listdir(tmp_path / "digits")) == {"1.0.0", ".1.0.0.lock"}


KILLS = 10
KILLED = """
import os, random, signal, sys, time
import tensorflow_datasets as tfds
from vgg_jax.data.prepare import cifar
from tests.data.archives import write_cifar10_archive
tfds.disable_progress_bar()
data_dir, archive, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
infos = write_cifar10_archive(archive, per_file=200)

def start(data_dir):
    pid = os.fork()
    if pid == 0:
        try:
            cifar.prepare("cifar10", data_dir, os.path.dirname(archive), infos)
            os._exit(0)
        finally:
            os._exit(1)
    return pid

begin = time.monotonic()
assert os.waitpid(start(data_dir + "/whole"), 0)[1] == 0
duration = time.monotonic() - begin
random.seed(0)
killed = 0
for i in range(kills):
    pid = start(data_dir + "/killed")
    time.sleep(random.uniform(0, duration))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if os.path.isdir(data_dir + "/killed/cifar10/3.0.2"):  # it was faster than the signal: from the start again
        os.rename(data_dir + "/killed", f"{data_dir}/done{i}")
pids = [start(data_dir + "/killed"), start(data_dir + "/killed")]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
print(killed)
"""


def test_killed_preparation_resumes_and_two_write_one_copy(tmp_path):
    """Ten processes are killed at random moments of a preparation; then two processes resume it at the same time."""
    arguments = [str(tmp_path), str(tmp_path / "cifar-10-binary.tar.gz"), str(KILLS)]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env={**os.environ}, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.splitlines()[-1]) >= 2  # the others finished before the signal
    copies = ["whole", "killed", *(path.name for path in tmp_path.glob("done*"))]
    for copy in copies:
        assert os.listdir(tmp_path / copy / "cifar10") in (["3.0.2", ".3.0.2.lock"], [".3.0.2.lock", "3.0.2"])
        for split in ("train", "test"):
            assert_same_records(
                records(tmp_path / copy, "cifar10", split), records(tmp_path / "whole", "cifar10", split)
            )


def test_data_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with raises_user_error("cannot write", str(tmp_path / "file" / "digits"), "--config.data.data_dir"):
        digits.prepare(str(tmp_path / "file"))


def test_full_disk_is_named_and_the_preparation_resumes(tmp_path):
    """A limit to the size of files stands for a full disk: array_record cannot finish the first file."""
    code = """
import resource, signal, sys
from vgg_jax.data.prepare import digits
from vgg_jax.errors import report_mistakes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(report_mistakes("prepare", lambda: digits.prepare(sys.argv[1]) or 0))
"""
    process = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert f"cannot write {tmp_path / 'digits' / '1.0.0'}" in line
    assert "free disk space" in line
    assert len(records(tmp_path, "digits", "test")) == digits.NUM_TEST  # now there is room
