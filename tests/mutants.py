"""Puts faults into a copy of the code, one at a time, and sees whether the tests find them.

    python -m tests.mutants [NAME...]

Prints a line for each fault; exits with 1 where the tests pass in spite of one. Takes about half a minute for each.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = "tests/training/test_golden_curve.py"


class Mutant(NamedTuple):
    """A fault: in `path`, `right` becomes `wrong`, which `tests` are to find."""

    name: str
    path: str
    right: str
    wrong: str
    tests: str = GOLDEN


MUTANTS = [
    Mutant(
        "fc6 flattened in the wrong order",
        "vgg_jax/weights/layouts.py",
        "lambda a: a.reshape(a.shape[0], -1, size, size).transpose(2, 3, 1, 0)",
        "lambda a: a.reshape(a.shape[0], size, size, -1).transpose(1, 2, 3, 0)",
    ),
    Mutant(
        "batch norm's momentum is 0.99",
        "vgg_jax/ops/normalization.py",
        "momentum: float = 0.9 ",
        "momentum: float = 0.99 ",
    ),
    Mutant(
        "batch norm's epsilon is 1e-3", "vgg_jax/ops/normalization.py", "epsilon: float = 1e-5", "epsilon: float = 1e-3"
    ),
    Mutant(
        "decay is not applied",
        "vgg_jax/training/optimizer.py",
        "optax.add_decayed_weights(config.weight_decay,",
        "optax.add_decayed_weights(0.0,",
    ),
    Mutant(
        "dropout at evaluation",
        "vgg_jax/model.py",
        "nn.Dropout(self.dropout_rate, deterministic=not train)(x)",
        "nn.Dropout(self.dropout_rate, deterministic=False)(x, rng=jax.random.key(0))",
    ),
    Mutant("no dropout in training", "vgg_jax/model.py", "deterministic=not train)(x)", "deterministic=True)(x)"),
    Mutant(
        "the data are not shuffled",
        "vgg_jax/data/sampler.py",
        'order = np.argsort(bits, kind="stable")',
        "order = np.arange(num_examples)",
    ),
    Mutant(
        "running statistics at training",
        "vgg_jax/model.py",
        "use_running_average=not train",
        "use_running_average=True",
    ),
    Mutant(
        "a step that is not finite is not undone",
        "vgg_jax/training/step.py",
        "finite=finite.all()",
        "finite=True",
        "tests/training/test_skipped_steps.py -k leaves_state_unchanged",
    ),
    Mutant(
        "momentum is not undone",
        "vgg_jax/training/optimizer.py",
        "functools.partial(jnp.where, finite)",
        "functools.partial(jnp.where, True)",
        "tests/training/test_skipped_steps.py -k leaves_state_unchanged",
    ),
    Mutant(
        "batch norm's statistics are not undone",
        "vgg_jax/training/state.py",
        "chosen.replace(step=state.step)",
        "chosen.replace(step=state.step, batch_stats=state.batch_stats)",
        "tests/training/test_skipped_steps.py -k leaves_state_unchanged",
    ),
    Mutant(
        "arrays are not compared with their checksums",
        "vgg_jax/training/checksums.py",
        "if saved.get(name) != found[name]]",
        "if False]",
        "tests/training/test_checkpoints.py -k named",
    ),
    Mutant(
        "the metadata are not compared with their checksum",
        "vgg_jax/training/checksums.py",
        "if _digest(metadata) != expected:",
        "if False:",
        "tests/training/test_checkpoints.py -k metadata",
    ),
    Mutant(
        "the directory is not locked",
        "vgg_jax/training/run_directory.py",
        "lock.acquire()",
        "pass",
        "tests/training/test_run_directory.py",
    ),
    Mutant(
        "the configuration is written before the checks",
        "vgg_jax/training/session.py",
        "write_config = stack.enter_context(open_run(workdir, config, allow_changes))",
        "(write_config := stack.enter_context(open_run(workdir, config, allow_changes)))()",
        "tests/training/test_refusals.py -k depth",
    ),
    Mutant(
        "damaged checkpoints are moved before the checks",
        "vgg_jax/training/checkpoints.py",
        "self._saving = False  # whether the outcome of a save is still unknown",
        "self._saving = bool(self._set_aside(dict.fromkeys(self._damaged, 'is damaged')))",
        "tests/training/test_refusals.py -k arrays",
    ),
]


def is_found(mutant: Mutant) -> bool:
    """Whether a test fails in a copy of the code with that fault."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("vgg_jax", "tests", "configs", "benchmarks", "train.py", "pyproject.toml", "README.md"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, pathlib.Path(copy) / name)
        path = pathlib.Path(copy) / mutant.path
        path.write_text(path.read_text().replace(mutant.right, mutant.wrong))
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        code = subprocess.run(command, cwd=copy, capture_output=True).returncode
    if code not in (0, 1):
        raise RuntimeError(f"pytest {mutant.tests} ended with {code}")
    return code == 1


def main(names: list[str]) -> int:
    """Tries the faults of these names, or all; returns the exit code."""
    missed = 0
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            found = is_found(mutant)
            missed += not found
            print(f"{'found ' if found else 'MISSED'}  {mutant.name}  ({mutant.tests})", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
