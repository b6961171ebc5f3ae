"""The directory of a run: one writer, a full, read-only or deleted directory, a changed configuration."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.test_train import ROOT, SMALL_IMAGES, command
from tests.conftest import raises_user_error
from tests.training.test_checkpoints import assert_equal_states, make_state, small_state
from vgg_jax.config import Config, OptimizerConfig
from vgg_jax.training import session
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.run import Run
from vgg_jax.training.run_directory import open_run

HOLDER = """
import sys, time
from vgg_jax.config import Config
from vgg_jax.training.run import Run
from vgg_jax.training.run_directory import open_run

with open_run(sys.argv[1], Config()):
    print("open", flush=True)
    time.sleep(60)
"""


def test_second_run_is_refused_and_stale_lock_is_ignored(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "open\n"
        expected = (f"another process is training in {tmp_path}", "--workdir")
        with raises_user_error(*expected), open_run(str(tmp_path), Config()):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (tmp_path / ".lock").exists()
    for _ in range(2):
        with open_run(str(tmp_path), Config()) as write_config:
            write_config()


def test_saved_steps_are_read_under_the_lock(tmp_path, monkeypatch):
    """Before the lock, another run might save a checkpoint in between."""

    def steps(directory):
        with raises_user_error("another process is training in"), open_run(str(tmp_path), Config()):
            pass
        raise StopIteration

    monkeypatch.setattr(session, "saved_steps", steps)
    run = object.__new__(Run)
    object.__setattr__(run, "config", Config(init_from="a.safetensors"))
    with contextlib.ExitStack() as stack, pytest.raises(StopIteration):
        session.open_session(run, str(tmp_path), False, False, stack)


@pytest.mark.parametrize("name", ["/proc/run", "file/run"], ids=["read_only", "below_a_file"])
def test_directory_that_cannot_be_made_is_refused(name, tmp_path):
    """Even root cannot write to /proc."""
    (tmp_path / "file").write_text("")
    workdir = os.path.join(tmp_path, name)
    with raises_user_error(f"cannot use the run's directory {workdir}: ", "--workdir"), open_run(workdir, Config()):
        pass


def test_bucket_is_refused():
    with raises_user_error("--workdir is gs://bucket/run", "mount"), open_run("gs://bucket/run", Config()):
        pass
    assert not os.path.exists("gs:")


def test_changed_config_needs_permission_and_lists_differences(tmp_path, capsys):
    workdir = str(tmp_path)
    with open_run(workdir, Config()) as write_config:
        write_config()
    changed = Config(seed=7, num_epochs=3, optimizer=OptimizerConfig(learning_rate=0.5))
    differences = ["config.optimizer.learning_rate is 0.5, was 0.1", "config.seed is 7, was 0"]
    with raises_user_error("; ".join(differences), "--allow_changes"), open_run(workdir, changed):
        pass
    assert capsys.readouterr().out == ""
    with open_run(workdir, changed, allow_changes=True) as write_config:
        assert capsys.readouterr().out.splitlines() == differences
        write_config()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(changed)))


def test_checkpoint_of_another_network_is_not_called_damaged(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(small_state(1), None)
    checkpoints.close()
    state = small_state(0)
    other = state.replace(params={"conv1_1": {"kernel": state.params["conv1_1"]["kernel"][:7]}})
    with raises_user_error("params/conv1_1/bias is [], expected none", "another --workdir"):
        Checkpoints(str(tmp_path / "checkpoints")).restore(other)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_save_into_a_deleted_directory_names_it(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(small_state(1), None)
    checkpoints.check()
    time.sleep(0.2)
    shutil.rmtree(tmp_path / "checkpoints")
    with raises_user_error(f"cannot save a checkpoint in {tmp_path / 'checkpoints'}: the directory is gone"):
        checkpoints.save(small_state(2), None)


FULL = """
import resource, signal, sys, time
from absl import logging
from tests.training.test_checkpoints import make_state
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.cli import train
from vgg_jax.errors import report_mistakes

logging.set_verbosity(logging.FATAL)  # as in train.py
train.ignore_abandoned_writes()

def run():
    checkpoints = Checkpoints(sys.argv[1])
    for step in (1, 2):
        checkpoints.save(make_state(step), {"accuracy": 0.5})
    checkpoints._manager.wait_until_finished()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints.save(make_state(3), {"accuracy": 0.6})
    time.sleep(5)  # a step
    checkpoints.check()
    return 0

sys.exit(report_mistakes("train.py", run))
"""


def test_failed_save_is_reported_and_old_checkpoints_survive(tmp_path):
    """A limit on the size of files stands for a full disk; the next test has a real one."""
    process = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    assert f"cannot save a checkpoint in {tmp_path}: " in error
    assert "intact checkpoints: step 1, 2; free disk space" in error
    checkpoints = Checkpoints(str(tmp_path))
    restored, _ = checkpoints.restore(make_state())
    assert_equal_states(restored, make_state(2))
    checkpoints.save(make_state(3), None)
    checkpoints.close()
    assert saved_steps(tmp_path)[-1] == 3


# A disk of 130 MB, with space for one checkpoint but not for two, which then grows to 2 GB.
FULL_DISK = """
mkdir -p "$1" && mount -t tmpfs -o size=130m none "$1" || exit 99
workdir="$1"; shift
"$@"; echo "full: exit code $?"; ls "$workdir/checkpoints"
mount -o remount,size=2g "$workdir"
"$@"; echo "with space: exit code $?"
"""


@pytest.mark.slow
def test_run_on_a_full_disk_resumes_after_space_is_freed(data_dir, tmp_path):
    fields = (
        *SMALL_IMAGES,
        *("model.depth=11", "data.classes=(0, 1)", "batch_size=32", "num_epochs=2", "log_every_steps=3"),
        "checkpoint_every_epochs=0.34",
    )
    train = command("digits.py", tmp_path / "run", data_dir, *fields)
    process = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", tmp_path / "run", *train],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    output = process.stdout.splitlines()
    failed = output.index("full: exit code 2")
    assert output[failed + 1] == "3"  # the only checkpoint
    assert "No space left on device" in process.stderr
    assert all(line.startswith("train.py: error: cannot") for line in process.stderr.splitlines()), process.stderr
    assert any("resuming from the checkpoint of step 3 " in line for line in output[failed:])
    assert output[-1] == "with space: exit code 0"
