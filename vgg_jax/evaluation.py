"""Evaluation of a network over a whole split."""

from collections.abc import Callable, Iterable

import jax

Batch = dict[str, jax.Array]


def evaluate(step: Callable[[Batch], dict[str, jax.Array]], batches: Iterable[Batch]) -> dict[str, float]:
    """The mean `loss` and `accuracy` over all examples, and their `count`.

    Args:
      step: `eval_step` of a state: from a batch to the sums over it.
      batches: each example once; those of weight 0 do not count.
    """
    sums = jax.device_get([step(batch) for batch in batches])
    loss, correct, count = (sum(float(s[key]) for s in sums) for key in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count, "count": int(count)}
