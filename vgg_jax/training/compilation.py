"""The programs of a run, compiled by threads while the state is made and the first batch is read."""

import concurrent.futures
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax

from vgg_jax.training.run import Run
from vgg_jax.training.sharding import with_sharding
from vgg_jax.training.state import TrainState


class Programs(NamedTuple):
    """The programs of a run."""

    train_steps: dict[int, jax.stages.Compiled]  # by the number of steps
    eval_step: Future[jax.stages.Compiled]  # complete before the first step, except on a CPU


class Compilation:
    """The compilation of the programs of a run in threads.

    XLA compiles without the lock of the interpreter, so meanwhile the state is made by a program of its own.
    """

    def __init__(self, run: Run, lengths: Collection[int]) -> None:
        """Lower the steps of training, and start to compile all programs.

        Args:
          run: the run, whose data are in place.
          lengths: the numbers of steps of the programs of training.
        """
        state = jax.tree.map(with_sharding, run.shapes, run.shardings)
        threads = ThreadPoolExecutor()
        self._train_steps: dict[int, Future[jax.stages.Compiled]] = {}
        for length in lengths:
            function = run.train_step if length == 1 else run.train_steps
            inputs = run.train_loader.train_shapes(run.config.step_size, length)
            lowered = function.lower(state, inputs, run.step_key)
            self._train_steps[length] = threads.submit(lowered.compile)
        self._eval_step = threads.submit(self._compile_evaluation, run, state)
        threads.shutdown(wait=False)  # the threads end with their work

    def _compile_evaluation(self, run: Run, state: TrainState) -> jax.stages.Compiled:
        """Return the compiled evaluation step; on a CPU, leave the cores to the steps of training first."""
        if jax.default_backend() == "cpu":
            concurrent.futures.wait(self._train_steps.values())
        batch = run.eval_loader.eval_shapes(run.config.eval_batch_size)
        compiled: jax.stages.Compiled = run.eval_step.lower(state, batch).compile()
        return compiled

    def result(self) -> Programs:
        """Return the programs as soon as training can start.

        On a CPU, the evaluation step is compiled during the first steps. An accelerator may time its kernels during
        compilation, so there it waits.
        """
        train_steps = {length: future.result() for length, future in self._train_steps.items()}
        if jax.default_backend() != "cpu":
            self._eval_step.result()
        return Programs(train_steps, self._eval_step)
