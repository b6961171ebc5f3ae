"""The memory of a run: constant over saves and evaluations, and equal to the reported one."""

import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.cli.test_train import ROOT, SMALL_IMAGES, command
from vgg_jax.training.host_copy import HostCopy
from vgg_jax.training.memory import resident_bytes

needs_linux = pytest.mark.skipif(resident_bytes() is None, reason="needs /proc of Linux")

# Take steps that overwrite a state of 64 MiB, and perhaps save it after each step. Print the memory that the process
# holds after each step.
SAVES = """
import sys
import jax, jax.numpy as jnp, optax
from absl import logging
from vgg_jax.runtime import keep_freed_memory
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.memory import resident_bytes
from vgg_jax.training.state import TrainState

logging.set_verbosity(logging.FATAL)
keep_freed_memory()
params = {f"conv{i}": {"kernel": jnp.zeros(2**20)} for i in range(8)}
state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), batch_stats={})
state = state.replace(step=jnp.asarray(0))
del params
step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
checkpoints = Checkpoints(sys.argv[1])
for _ in range(int(sys.argv[2])):
    state = jax.block_until_ready(step(state))
    if sys.argv[3] == "save":
        checkpoints.save(state, None)
    print(resident_bytes(), flush=True)
checkpoints.close()
"""
STATE = 2**26


def resident_after_each_step(*arguments):
    process = subprocess.run(
        [sys.executable, "-c", SAVES, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [int(line) for line in process.stdout.splitlines()]


@pytest.mark.slow
@needs_linux
def test_memory_is_constant_over_saves(tmp_path):
    """Successive saves overlap, so that each step runs beside a save that reads the state before it."""
    without = resident_after_each_step(tmp_path / "without", 3, "step")[-1]
    held = resident_after_each_step(tmp_path / "with", 24, "save")
    assert held[-1] < 1.05 * held[4]
    assert held[-1] - without < 1.5 * STATE


def test_host_copy_is_overwritten_in_place():
    """Small arrays, large arrays with pages of their own, and then another layout."""
    tree = {"small": np.arange(3), "large": np.ones((600, 500), np.float32), "none": np.zeros((0, 2), bool)}
    host_copy = HostCopy()
    first = host_copy.update(tree)
    for name, array in tree.items():
        assert not np.shares_memory(first[name], array)
        np.testing.assert_array_equal(first[name], array)
    second = host_copy.update({name: array + array for name, array in tree.items()})
    assert all(second[name] is first[name] for name in tree)
    np.testing.assert_array_equal(first["large"], tree["large"] * 2)
    np.testing.assert_array_equal(host_copy.update({"small": np.arange(4.0)})["small"], np.arange(4.0))


class Watched:
    """A run of train.py, and the memory that it holds at each line of its output."""

    def __init__(self, config, workdir, data_dir, *fields):
        arguments = command(config, workdir, data_dir, *fields)
        self._process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        self.resident, self.reported = {}, None
        for line in self._process.stdout:
            if found := re.search(r"resident ([\d.]+) GiB", line):
                self.reported = float(found.group(1)) * 2**30
            if found := re.match(r"(train|eval) +step (\d+)/", line):
                self.resident[found.group(1), int(found.group(2))] = self._held()
        self._process.stdout.close()
        assert self._process.wait() == 0

    def _held(self):
        with open(f"/proc/{self._process.pid}/status") as file:
            (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", file.read())
        return int(kilobytes) * 1024


# A state of 0.45 GiB: parameters, two moments, moving averages. An epoch of zeros and ones has nine steps.
LARGE_STATE = (
    *SMALL_IMAGES,
    *("model.depth=11", "model.hidden=(4096, 4096)", "data.classes=(0, 1)", "batch_size=32", "log_every_steps=1"),
    *("optimizer.name=adam", "optimizer.learning_rate=1e-5", "optimizer.ema_decay=0.99"),
)
EVERY_STEP = 1 / 9


@needs_linux
@pytest.mark.slow
def test_memory_is_constant_over_200_saves_and_evaluations(data_dir, tmp_path):
    """A run without saves, a run that saves and evaluates after each of 200 steps, and 60 steps after a resume."""
    every = (f"eval_every_epochs={EVERY_STEP}", f"checkpoint_every_epochs={EVERY_STEP}")
    fields = ("digits.py", tmp_path / "without", data_dir, *LARGE_STATE, every[0])
    without = Watched(*fields, "checkpoint_every_epochs=99", f"num_epochs={20 / 9}")
    fields = ("digits.py", tmp_path / "with", data_dir, *LARGE_STATE, *every)
    state = 4 * 4 * 28_100_000  # bytes
    for steps in (range(1, 201), range(201, 261)):
        run = Watched(*fields, f"num_epochs={steps[-1] / 9}")
        for kind in ("train", "eval"):
            at_10, *later = [run.resident[kind, step] for step in steps[9:]]
            print(f"{kind}: {at_10 / 2**20:.0f} MiB, then {min(later) / 2**20:.0f} to {max(later) / 2**20:.0f}")
            assert max(later) < 1.05 * at_10
            assert max(later) - without.resident[kind, 19] < 1.5 * state


def write_folders(root, size, count):
    """Write random images of two classes: `count` of each for training, and 8 of each for evaluation."""
    random = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 8)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (size, size, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "batch_size", "fields"),
    [
        pytest.param(16, 64, ("model.depth=11", *SMALL_IMAGES), id="vgg11_bn-16"),
        pytest.param(32, 64, ("model.depth=11",), id="vgg11_bn-32"),
        pytest.param(32, 128, ("model.depth=16",), id="vgg16_bn-32"),
        pytest.param(
            224,
            8,
            (
                *("model.batch_norm=False", "model.pool_size=7", "model.hidden=(4096, 4096)", "model.num_classes=1000"),
                *("data.image_size=224", "data.resize=224", "eval_batch_size=8", "optimizer.learning_rate=1e-4"),
            ),
            id="vgg16-224",
        ),
    ],
)
def test_run_holds_the_memory_that_it_reports(size, batch_size, fields, tmp_path):
    """The largest memory after any step or evaluation, of two evaluations and two saves, within 20 %."""
    write_folders(tmp_path / "data", size, batch_size)
    common = (f"data.dataset={tmp_path / 'data'}", f"batch_size={batch_size}", "num_epochs=2", "log_every_steps=1")
    run = Watched("vgg16.py", tmp_path / "run", tmp_path, *common, "optimizer.warmup_epochs=0", *fields)
    most = max(run.resident.values())
    print(f"reported {run.reported / 2**20:.0f} MiB, held {most / 2**20:.0f}")
    assert most == pytest.approx(run.reported, rel=0.2)
