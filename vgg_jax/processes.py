"""The processes of a run, one or more: how they find each other, leave at the same step, and say which one is lost."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vgg_jax.errors import UserError, first_line
from vgg_jax.reporting import say

HEARTBEAT_SECONDS = 20  # a process that is silent for so long is lost
WATCH_SECONDS = 5
PATIENCE_SECONDS = 30  # of the first process at its end, with others that are slower
LOST = 3  # the exit code where another process is lost


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Joins the other processes, and leaves with them; within it, they are one run.

    Where another process is lost, this one ends with exit code 3 and a line that names it; where that is the first,
    JAX aborts this one, and speaks of the leader task. JAX aborts it too where the others do not come within five
    minutes. The first process speaks for all: what the others write to standard output is dropped.

    Args:
      coordinator: HOST:PORT of the first process. What is None, JAX finds out: from Slurm, Open MPI, Kubernetes, or on
        Cloud TPU.
      num_processes: how many there are.
      process_id: which of them this is.

    Raises:
      UserError: where there is no such environment, or the arguments do not fit.
    """
    say(f"joining the other processes{f' at {coordinator}' if coordinator else ''}")
    jax.config.update("jax_enable_recoverability", True)  # else JAX aborts where we name the process that is lost
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, IndexError) as error:  # the last for an address without a port
        raise UserError(
            f"cannot join the other processes: {first_line(error)}; expected to run under Slurm, Open MPI or "
            "Kubernetes or on Cloud TPU, or --coordinator HOST:PORT with --num_processes and --process_id"
        ) from None
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), daemon=True)
    watch.start()
    try:
        yield
        multihost_utils.sync_global_devices("the end of the run")
    except UserError:
        raise
    except Exception:  # of several kinds, where a collective fails
        watch.join(2 * HEARTBEAT_SECONDS)  # it ends this process where another one is lost, which then is the reason
        raise
    finally:
        ended.set()
        watch.join(PATIENCE_SECONDS)
        jax.distributed.shutdown()


def check_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where Slurm runs several processes that do not know of each other."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UserError(f"Slurm runs {tasks} of this process, each on its own; add --distributed, and they are one run")


def meet(where: str) -> None:
    """Waits until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class StopSignals:
    """Within it, SIGINT and SIGTERM end the process at once, until they are awaited: then they are noted instead.

    At once, for the compiler would keep Python from asking for a minute; and there is nothing yet to save.
    """

    _received: int | None = None
    _sent: int | None = None

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        return self

    def await_them(self) -> None:
        """From now on they are noted."""
        # Of a SIGTERM to one of several processes JAX itself tells the others.
        handler = self._note if jax.process_count() == 1 else self._terminate
        for number in self._before:
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received_before(self, step: int) -> int | None:
        """The signal after which all processes are to leave with this step. Asked at every step, by all of them."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._received = self._sent or signal.SIGTERM
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._sent = number
        os.kill(os.getpid(), signal.SIGTERM)


def _watch(ended: threading.Event) -> None:
    """Asks again and again which processes live, until the run ends or one is lost.

    The first process, on which the others' connection depends, waits until they have left.
    """
    everyone, first = set(range(jax.process_count())), jax.process_index() == 0
    lost: set[int] = set()
    while not ended.wait(WATCH_SECONDS) or (first and lost < everyone - {0}):
        try:
            with multihost_utils.live_devices(jax.devices()) as devices:
                lost = everyone - {device.process_index for device in devices}
        except multihost_utils.ProcessFailureError as error:  # while it asked
            lost = {device.process_index for device in error.failed_devices}
        except Exception:  # of several kinds, where JAX's service does not answer: it aborts the process soon
            time.sleep(1)
        if lost and not ended.wait(1):  # it may just have left, with us
            names = ", ".join(map(str, sorted(lost)))
            print(
                f"error: process {names} of {len(everyone)} is lost: see what it says, and its machine; the same "
                "command in all processes goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)
