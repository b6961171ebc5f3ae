"""Agreement of the processes of a run: small values that they exchange, and the end of one that all learn of.

The values pass through the key-value store of JAX's coordination service. Unlike a collective, it needs no device, and
a process that waits in it learns that another one has ended.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jax._src import distributed  # the only access to the key-value store

from vgg_jax.errors import UserError

ENDED, LEFT, VALUES = "vgg_jax/ended/", "vgg_jax/left/", "vgg_jax/values/"
POLL_SECONDS = 1.0
SHOWN = 3  # differences in a message
_numbers = itertools.count()  # of the exchanges; all processes take part in each, in the same order


def process_total() -> int:
    """Return the number of processes, without starting JAX's devices, which needs all processes."""
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    """Return the index of this process, likewise."""
    return distributed.global_state.process_id


def exchange(value: Any) -> list[Any]:
    """Return the values of all processes by index; all of them call this, in the same order.

    Args:
      value: a JSON value.

    Raises:
      UserError: if another process has ended.
    """
    if process_total() == 1:
        return [value]
    prefix = f"{VALUES}{next(_numbers)}/"
    client = _client()
    client.key_value_set(f"{prefix}{process_index()}", json.dumps(value))
    if process_index() == 0:  # the others read one value, instead of as many as there are processes
        values = [json.loads(_await(f"{prefix}{process}")) for process in range(process_total())]
        client.key_value_set(f"{prefix}all", json.dumps(values))
        return values
    everyone: list[Any] = json.loads(_await(f"{prefix}all"))
    return everyone


def meet() -> None:
    """Wait until all processes are here."""
    exchange(None)


def require_equal(facts: Mapping[str, Any], remedy: str) -> None:
    """Raise UserError in all processes if their facts differ.

    Args:
      facts: JSON values by name.
      remedy: what to do if they differ, in the imperative.
    """
    first, *others = exchange(dict(facts))
    for process, other in enumerate(others, 1):
        names = [name for name in first | other if first.get(name, "none") != other.get(name, "none")]
        if names:
            found = [
                f"{name} is {_shown(other.get(name, 'none'))} in process {process}, {_shown(first.get(name, 'none'))} "
                "in process 0"
                for name in names[:SHOWN]
            ]
            more = f"; {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UserError(f"the processes differ: {'; '.join(found)}{more}; {remedy}")


def announce_end(reason: str) -> None:
    """Write down why this process ends, for the others."""
    with contextlib.suppress(Exception):  # of several kinds, if the service is gone
        _client().key_value_set(f"{ENDED}{process_index()}", reason)


def end_of_another() -> str | None:
    """Return a line about another process that has ended for a reason of its own; None if there is none."""
    for key, reason in _client().key_value_dir_get(ENDED):
        process = int(key.rpartition("/")[2])
        if process != process_index():
            return f"process {process} of {process_total()} has ended: {reason}"
    return None


def leave(seconds: float) -> None:
    """Write down that this process leaves; the first one, whose service the others need, waits for them to leave.

    Args:
      seconds: how long it waits at most.
    """
    client = _client()
    deadline = time.monotonic() + seconds
    with contextlib.suppress(Exception):  # of several kinds, if the service is gone
        client.key_value_set(f"{LEFT}{process_index()}", "")
        while process_index() == 0 and time.monotonic() < deadline:
            if len(client.key_value_dir_get(LEFT)) == process_total():
                return
            time.sleep(0.1)


def _await(key: str) -> str:
    """Return the value of a key once it is set; raise UserError if another process has ended."""
    for _ in itertools.repeat(None):
        with _not_yet():
            return str(_client().blocking_key_value_get(key, int(1000 * POLL_SECONDS)))
        if reason := end_of_another():
            raise UserError(reason)
    raise AssertionError  # the loop is endless


@contextlib.contextmanager
def _not_yet() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # JAX's type of error has differed between versions
        if "DEADLINE_EXCEEDED" not in str(error):
            raise


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"


def _client() -> Any:
    return distributed.global_state.client
