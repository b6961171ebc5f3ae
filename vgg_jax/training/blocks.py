"""Blocks of training steps: several steps in one program, so that an accelerator does not wait for the host.

The host takes about a tenth of a millisecond to start a program. A step of a small network takes hardly more on a fast
accelerator. A block ends where something happens between two steps: a report, an evaluation, a checkpoint, the end of
an epoch, of a profile or of the run. XLA:CPU runs the steps of a loop 27 to 41 times slower, so a CPU takes single
steps.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

LONGEST = 50  # steps of a block; a signal stops the run after the block in progress
ENOUGH = 8  # a block of so many steps hides the time of the host
CHECKED_GAPS = 1000  # so many gaps between events decide about the length

Step = Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]


def several(step: Step) -> Step:
    """Return a function that takes several steps, with the arguments of `step`.

    Every entry of its batch except `resident` has one more axis in front, the steps. So have the metrics.

    Args:
      step: from (state, batch, key) to (state, metrics).
    """

    def steps(state: Any, inputs: Mapping[str, Any], key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        shared = {name: value for name, value in inputs.items() if name == "resident"}
        each = {name: value for name, value in inputs.items() if name != "resident"}
        return jax.lax.scan(lambda state, rows: step(state, {**shared, **rows}, key), state, each)

    return steps


def gaps(start: int, end: int, periods: Collection[int], bounds: Collection[int] = ()) -> Iterator[int]:
    """Yield the numbers of steps from one event to the next.

    Args:
      start: the position of the first step.
      end: the position after the last step.
      periods: something happens at each multiple of these positions.
      bounds: further positions between which nothing happens.
    """
    while start < end:
        event = min(end, *((start // period + 1) * period for period in periods), *(b for b in bounds if b > start))
        yield event - start
        start = event


def best_length(end: int, periods: Collection[int]) -> int:
    """Return the number of steps of a block.

    If the events allow it, the blocks leave no single steps, which would need a program of their own. Otherwise it is
    the smallest number that needs the fewest dispatches. The result depends on the whole run, not on the step that it
    resumes from, so a resumed run runs the same programs.

    Args:
      end: the steps of the run.
      periods: something happens at each multiple of these steps.
    """
    lengths = list(itertools.islice(gaps(0, end, periods), CHECKED_GAPS))
    whole = max(n for n in range(1, LONGEST + 1) if math.gcd(*lengths) % n == 0)
    if whole >= ENOUGH:
        return whole
    return min(range(1, LONGEST + 1), key=lambda length: sum(map(lambda gap: sum(divmod(gap, length)), lengths)))


def lengths(gaps: Iterator[int], length: int) -> Iterator[int]:
    """Yield the numbers of steps of the programs: blocks of `length`, then single steps up to the next event."""
    for gap in gaps:
        blocks, rest = divmod(gap, length)
        yield from itertools.repeat(length, blocks)
        yield from itertools.repeat(1, rest)
