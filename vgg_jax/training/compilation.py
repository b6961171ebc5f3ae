"""The programs of a run, compiled by threads while the state is made and the first batch is read."""

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax

from vgg_jax.training.run import Run
from vgg_jax.training.sharding import with_sharding


class Programs(NamedTuple):
    """The compiled programs of a run."""

    train_steps: dict[int, jax.stages.Compiled]  # by the number of steps
    eval_step: jax.stages.Compiled


class Compilation:
    """The compilation of the programs of a run in threads.

    XLA compiles without the lock of the interpreter, so meanwhile the state is made by a program of its own.
    """

    def __init__(self, run: Run, lengths: Collection[int]) -> None:
        """Lower the programs and start to compile them.

        Args:
          run: the run, whose data are in place.
          lengths: the numbers of steps of the programs of training.
        """
        state = jax.tree.map(with_sharding, run.shapes, run.shardings)
        threads = ThreadPoolExecutor()
        self._train_steps: dict[int, Future[jax.stages.Compiled]] = {}
        for length in lengths:  # first, because they take longest
            function = run.train_step if length == 1 else run.train_steps
            inputs = run.train_loader.train_shapes(run.config.step_size, length)
            lowered = function.lower(state, inputs, run.step_key)
            self._train_steps[length] = threads.submit(lowered.compile)
        batch = run.eval_loader.eval_shapes(run.config.eval_batch_size)
        self._eval_step = threads.submit(run.eval_step.lower(state, batch).compile)
        threads.shutdown(wait=False)  # the threads end with their work

    def result(self) -> Programs:
        """Return the programs when all of them are compiled."""
        train_steps = {length: future.result() for length, future in self._train_steps.items()}
        return Programs(train_steps, self._eval_step.result())
