"""The memory of a run: the bytes that its process holds now and will hold."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from vgg_jax.config import Config
from vgg_jax.errors import UserError, out_of_memory


def resident_bytes() -> int | None:
    """Return the bytes of physical memory that this process holds; None on systems without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


@contextlib.contextmanager
def explains_out_of_memory(config: Config) -> Iterator[dict[str, int]]:
    """Turn exhausted memory into a UserError with what the run needs and what reduces it.

    Args:
      config: the configuration of the run.

    Yields:
      A dictionary for the result of `run_memory`, which is empty at first.
    """
    needed: dict[str, int] = {}
    try:
        yield needed
    except (MemoryError, RuntimeError) as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        amounts = [
            f"a {name} needs {needed[key] / 2**30:.2f} GiB on each device"
            for key, name in (("peak", "step"), ("evaluation", "step of the evaluation"))
            if key in needed
        ]
        remat = "" if config.model.remat else ", set config.model.remat=True"
        remedy = (
            f"lower config.batch_size (now {config.batch_size}), raise config.accumulation_steps (now "
            f"{config.accumulation_steps}){remat}, or lower config.eval_batch_size (now {config.eval_batch_size}), "
            "then rerun with --allow_changes"
        )
        raise UserError("; ".join([problem, *amounts, remedy])) from error


def run_memory(step: jax.stages.Compiled, evaluation: jax.stages.Compiled | None, state: Any) -> dict[str, int]:
    """Return the memory that a run needs, in bytes; empty if the compiler gives no figures.

    Call it when the state and the data are in memory, after `return_freed_memory`.

    Args:
      step: the compiled training step, which donates the state.
      evaluation: the compiled evaluation step; without it, only `peak` and `temporary` are known.
      state: the training state.

    Returns:
      `peak`: the bytes of each device during a step, with state and batch. `temporary`: the part of `peak` that is free
      between steps. `evaluation`: the temporary bytes of an evaluation step. On a CPU under Linux, also `resident`: the
      bytes that this process will hold. This is the sum of the bytes that it holds now, of the larger of `temporary`
      and `evaluation`, and of the host copy of the state for checkpoints.
    """
    of_step = step.memory_analysis()
    if of_step is None:
        return {}
    lasting = of_step.argument_size_in_bytes + of_step.output_size_in_bytes - of_step.alias_size_in_bytes
    temporary = of_step.temp_size_in_bytes
    memory = {"peak": lasting + temporary, "temporary": temporary}
    of_evaluation = None if evaluation is None else evaluation.memory_analysis()
    if of_evaluation is None:
        return memory
    memory["evaluation"] = of_evaluation.temp_size_in_bytes
    held = resident_bytes()
    if jax.default_backend() == "cpu" and held is not None:
        leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
        copy = sum(leaf.nbytes for leaf in leaves) if jax.process_count() == 1 else 0
        memory["resident"] = held + jax.local_device_count() * max(temporary, memory["evaluation"]) + copy
    return memory
