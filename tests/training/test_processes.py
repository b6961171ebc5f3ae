"""Runs of two real processes, which join on localhost as they would on two machines."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import time

import pytest

from tests.cli.test_train import NARROW, SMALL_IMAGES, command
from tests.conftest import raises_user_error
from vgg_jax.training.processes import LOST, check_alone

# In float64, so that batch norm does not amplify another order of summation. An epoch of zeros and ones has nine steps.
FIELDS = (
    *SMALL_IMAGES,
    *("data.classes=(0, 1)", "batch_size=32"),
    *("model.dtype=float64", "log_every_steps=1", "checkpoint_every_epochs=0.5", "eval_every_epochs=0.5"),
    *("optimizer.schedule=plateau", "optimizer.plateau_patience=1", "optimizer.step_factor=0.5"),
    *("optimizer.warmup_epochs=0", "optimizer.learning_rate=0.01"),
)


@contextlib.contextmanager
def two_processes(workdir, data_dir, *fields):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [*command("digits.py", workdir, data_dir, *FIELDS, *fields, script=NARROW), "--coordinator", address]
    processes = [
        subprocess.Popen(
            [*arguments, "--num_processes=2", f"--process_id={i}"],
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        )
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines if line["kind"] != "memory"]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def train(workdir, data_dir, *fields):
    arguments = command("digits.py", workdir, data_dir, *FIELDS, *fields, script=NARROW)
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_same_losses(actual, expected):
    assert [line[:2] for line in actual] == [line[:2] for line in expected]
    for (*_, loss), (kind, step, reference) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(reference, rel=1e-5), (kind, step)


@pytest.mark.slow
def test_two_processes_equal_one_and_one_resumes_after_a_kill(data_dir, tmp_path):
    with two_processes(tmp_path / "two", data_dir, "num_epochs=1") as (first, second):
        wait_for(first, "step 6/9")
        second.send_signal(signal.SIGKILL)
        start = time.monotonic()
        train(tmp_path / "one", data_dir, "num_epochs=1")  # while the first waits for the heartbeat of the other
        _, error = first.communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert first.returncode == LOST
        assert "error: process 1 of 2 is lost" in error.splitlines()[-1]
    # The steps of both processes, and of one process that resumes, equal those of an uninterrupted process.
    expected = lines(tmp_path / "one")
    assert len(expected) == 9 + 3
    trained = lines(tmp_path / "two")
    assert_same_losses(trained, expected[: len(trained)])
    assert len(trained) >= 6 + 1
    resumed = train(tmp_path / "two", data_dir, "num_epochs=1")
    assert re.search(r"resuming from the checkpoint of step (4|8) ", resumed)  # the last complete one
    assert_same_losses(lines(tmp_path / "two"), expected)


@pytest.mark.slow
def test_two_processes_finish_and_resume(data_dir, tmp_path):
    train(tmp_path / "one", data_dir, "num_epochs=1")
    for epochs in ("0.5", "1"):
        with two_processes(tmp_path / "two", data_dir, f"num_epochs={epochs}") as processes:
            outputs = [process.communicate(timeout=120) for process in processes]
            assert [process.returncode for process in processes] == [0, 0], outputs
            assert "on 2 cpu device(s)" in outputs[0][0]
            assert "VGG" not in outputs[1][0]  # the first prints for both
    assert_same_losses(lines(tmp_path / "two"), lines(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("receiver", [0, 1])
def test_signal_to_one_process_stops_both_at_the_same_step(receiver, data_dir, tmp_path):
    with two_processes(tmp_path, data_dir, "num_epochs=20") as processes:
        wait_for(processes[0], "step 3/")
        processes[receiver].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, outputs
    stopped = [line for line in outputs[0][0].splitlines() if line.startswith("stopped at step ")]
    assert len(stopped) == 1
    step = int(stopped[0].split()[3])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
def test_loss_of_the_first_process_ends_the_other(data_dir, tmp_path):
    with two_processes(tmp_path, data_dir, "num_epochs=20") as (first, second):
        wait_for(first, "step 3/")
        first.send_signal(signal.SIGKILL)
        _, error = second.communicate(timeout=60)
        assert second.returncode != 0
        assert "leader task" in error or "process 0 of 2 is lost" in error


def test_separate_slurm_tasks_are_refused():
    check_alone({})
    check_alone({"SLURM_STEP_NUM_TASKS": "1"})
    with raises_user_error("Slurm runs 8 separate copies", "--distributed"):
        check_alone({"SLURM_STEP_NUM_TASKS": "8"})
