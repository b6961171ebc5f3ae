"""Real runs that are killed or stopped at random moments and resume without any difference."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from tests.cli.test_train import NARROW, SMALL_IMAGES, command, saved_arrays, train
from vgg_jax.training.checkpoints import saved_steps

INTERVAL = 4  # steps from save to save
STEPS = 36
# The 288 zeros and ones make an epoch of nine steps.
FIELDS = (
    *SMALL_IMAGES,
    *("model.depth=11", "data.classes=(0, 1)", "batch_size=32", "num_epochs=4", "optimizer.ema_decay=0.99"),
    *("optimizer.schedule=plateau", "optimizer.plateau_patience=1", "optimizer.step_factor=0.5"),
    *(f"checkpoint_every_epochs={INTERVAL / 9}", "log_every_steps=3", "eval_every_epochs=0.5"),
)


class Run:
    """A process of train.py, and its lines so far."""

    def __init__(self, workdir, data_dir):
        self.checkpoints = workdir / "checkpoints"
        self.process = subprocess.Popen(
            command("digits.py", workdir, data_dir, *FIELDS, script=NARROW),
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, condition):
        """Wait until the condition holds; return False if the process ended before."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True

    def says(self, text):
        return any(text in line for line in list(self.lines))

    def is_saving(self):
        with contextlib.suppress(FileNotFoundError):
            return any("tmp" in name for name in os.listdir(self.checkpoints))
        return False

    def steps(self, pattern):
        return [int(found.group(1)) for line in list(self.lines) if (found := re.search(pattern, line))]

    def end(self, timeout=60):
        """Wait for the end; return the exit code."""
        if not self.process.stdout.closed:
            self.process.wait(timeout)
            self._reader.join()
            assert self.process.stderr.read() == ""
            self.process.stdout.close()
            self.process.stderr.close()
        return self.process.returncode


def recorded(workdir):
    """Return the lines of metrics.jsonl without times and memory."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("memory") == 1
    measured = ("images_per_second", "model_flops_per_second")  # in time
    return [{k: v for k, v in line.items() if k not in measured} for line in lines if line["kind"] != "memory"]


def assert_same_end(workdir, whole):
    expected, actual = saved_arrays(whole), saved_arrays(workdir)
    assert expected.keys() == actual.keys()
    assert len(expected) > 100
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    assert recorded(workdir) == recorded(whole)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    assert f"finished: step {STEPS}" in train("digits.py", workdir, data_dir, *FIELDS, script=NARROW)
    return workdir


def kill(run, random, inside_save):
    """Kill the run at a random moment; return whether that was before its end, and whether inside a save."""
    since = random.choice(["VGG-11 with", "GiB", "GiB"])  # in training more often than before it
    started = run.wait_for(lambda: run.says("GiB" if inside_save else since))
    time.sleep(random.uniform(0, 3))
    if inside_save and started:
        started = run.wait_for(run.is_saving)
        time.sleep(random.uniform(0, 0.03))
    if not started or run.process.poll() is not None:
        return False, False
    run.process.kill()
    run.end()
    return True, run.is_saving()


def terminate(run, random, twice):
    """Send SIGTERM at a random moment, perhaps twice; return the step at which the run stopped, None at its end."""
    since = random.choice(["evaluation images", "GiB", "GiB"])
    run.wait_for(lambda: run.says(since))
    time.sleep(random.uniform(0, 3))
    run.process.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(random.uniform(0, 0.5))
        run.process.send_signal(signal.SIGTERM)
    code = run.end(timeout=30)
    if run.says("finished"):
        return None
    if code == -signal.SIGTERM and not run.says("GiB"):  # before the first step there is nothing to save
        return None
    # A second signal may arrive while the interpreter shuts down; then it has its default action.
    assert code in ((143, -signal.SIGTERM) if twice else (143,))
    (step,) = run.steps(r"stopped at step (\d+) \(saved\)")
    assert not run.is_saving()
    saved = saved_steps(run.checkpoints)
    assert saved[-1:] == [step], run.lines
    return step


@pytest.mark.parametrize(
    ("kills", "stops"),
    [(1, 1), pytest.param(100, 0, marks=pytest.mark.slow), pytest.param(0, 30, marks=pytest.mark.slow)],
)
def test_killed_or_stopped_run_equals_an_uninterrupted_run(kills, stops, whole, data_dir, tmp_path):
    """Kill with -9, a third inside a save; send SIGTERM, every third time twice. Print the lost steps (-rP)."""
    random = np.random.default_rng(kills + stops)
    inside_saves, stopped, lost = [], [], []

    def killing():  # a slow machine may end a save before the signal arrives; then it kills once more
        return len(inside_saves) < kills or 3 * sum(inside_saves) < kills

    for number in itertools.count():
        workdir, reached, least = tmp_path / str(number), 0, 0
        while True:
            run = Run(workdir, data_dir)
            killed, stop = False, None
            if killing():
                killed, inside = kill(run, random, inside_save=3 * sum(inside_saves) <= len(inside_saves) + 6)
                inside_saves += [inside] * killed
            elif len(stopped) < stops:
                stop = terminate(run, random, twice=len(stopped) % 3 == 0)
                stopped += [stop] if stop else []
            code = run.end()
            if run.says("GiB"):  # it reached its first step
                resumed = (run.steps(r"resuming from the checkpoint of step (\d+)") or [0])[0]
                assert resumed >= least
                lost += [reached - resumed] if reached else []
                reached = max([*run.steps(r"train   step (\d+)/"), resumed])
                least = stop or (reached // INTERVAL - 1) * INTERVAL  # at worst, the last save was incomplete
            if code == 0:
                break
        assert_same_end(workdir, whole)
        if not killing() and len(stopped) >= stops:
            break
    print(f"{len(inside_saves)} kills, {sum(inside_saves)} of them inside a save; {len(stopped)} stops;")
    print(
        f"{number + 1} runs to the end, bit for bit; steps lost, of {INTERVAL} from save to save: at most {max(lost)}"
    )
    assert 3 * sum(inside_saves) >= kills
