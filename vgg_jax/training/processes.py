"""The processes of a run: joining each other, leaving together, naming a process that is lost or has ended."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vgg_jax.console import log
from vgg_jax.errors import UserError, first_line
from vgg_jax.training.agreement import announce_end, end_of_another, leave, meet, process_index, process_total

HEARTBEAT_SECONDS = 20  # a process without a heartbeat for this long is lost
WATCH_SECONDS = 5  # between two queries for lost processes
LISTEN_SECONDS = 1  # between two queries for processes that have ended
GRACE_SECONDS = 5  # this process has so long to end by itself, once another one has
PATIENCE_SECONDS = 30  # the first process waits this long for slower ones at the end
MISTAKE, LOST = 2, 3  # the exit codes if another process has ended with an error, and if it is lost

_undo: list[Callable[[], None]] = []  # called before an abrupt end


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: Sequence[int] | None = None,
) -> Iterator[None]:
    """Join the other processes to one run for the time of the context.

    If a process ends with an error, the others end with exit code 2 and a line that names it and its error. If another
    process is lost, this process ends with exit code 3 and a line that names the lost one. JAX aborts this process if
    the others do not join within five minutes. Only the first process writes to standard output.

    Args:
      coordinator: HOST:PORT of the first process. For each argument that is None, JAX asks the environment: Slurm, Open
        MPI, Kubernetes or Cloud TPU.
      num_processes: the number of processes.
      process_id: the index of this process, from 0.
      local_device_ids: the GPUs of this machine that this process uses; None means all of them, unless the environment
        says otherwise.

    Raises:
      UserError: if there is no such environment, the arguments do not fit, or another process has ended.
    """
    log(f"joining the other processes{f' at {coordinator}' if coordinator else ''}")
    jax.config.update("jax_enable_recoverability", True)  # else JAX aborts before we name the lost process
    try:
        jax.distributed.initialize(
            *(coordinator, num_processes, process_id, local_device_ids), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        raise UserError(
            f"cannot join the other processes: {first_line(error)}; expected Slurm, Open MPI, Kubernetes or Cloud TPU; "
            "elsewhere, set --coordinator HOST:PORT with --num_processes and --process_id"
        ) from None
    if process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    ended, failed = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, failed), daemon=True)
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    watch.start()
    try:
        yield
        meet()
    except Exception as error:  # a failing collective raises several kinds
        if not isinstance(error, UserError):
            watch.join(2 * HEARTBEAT_SECONDS)  # if a lost process is the cause, the watch names it and ends this one
        failed.set()
        if not end_of_another():
            announce_end(first_line(error))
        leave(PATIENCE_SECONDS)
        raise
    finally:
        ended.set()
        if not failed.is_set():
            watch.join(PATIENCE_SECONDS)
        jax.distributed.shutdown()


@contextlib.contextmanager
def undone_at_an_abrupt_end(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` if this process has to end inside the context because another process has ended."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


def check_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if Slurm runs several processes that are not joined."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UserError(f"Slurm runs {tasks} separate copies of this command; add --distributed to join them")


class StopSignals:
    """The context in which SIGINT and SIGTERM first end the process at once, and after `await_them` are recorded.

    At first there is nothing to save, and during compilation Python could not react to a recorded signal for a minute.
    """

    _received: int | None = None
    _sent: int | None = None

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        return self

    def await_them(self) -> None:
        """Record the signals from now on."""
        # JAX itself forwards a SIGTERM from one of several processes to the others.
        handler = self._record if jax.process_count() == 1 else self._terminate
        for number in self._before:
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received_before(self, step: int) -> int | None:
        """Return the signal that stops all processes after this step, or None; all of them call this at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._received = self._sent or signal.SIGTERM
        return self._received

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._sent = number
        os.kill(os.getpid(), signal.SIGTERM)


def _listen(ended: threading.Event) -> None:
    """End this process if another one has ended with an error and this one has not noticed within a few seconds."""
    while not ended.wait(LISTEN_SECONDS):
        reason = None
        with contextlib.suppress(Exception):  # of several kinds, if JAX's service is gone
            reason = end_of_another()
        if reason and not ended.wait(GRACE_SECONDS):
            _end(reason, MISTAKE)


def _end(reason: str, code: int) -> None:
    """End this process at once, although its main thread may wait in a collective."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    for undo in reversed(_undo):
        undo()
    leave(PATIENCE_SECONDS if code == MISTAKE else 0)
    os._exit(code)


def _watch(ended: threading.Event, failed: threading.Event) -> None:
    """Query which processes live until the run ends or one is lost.

    The first process waits until the others have left, because their connection depends on it.
    """
    everyone, first = set(range(process_total())), process_index() == 0
    lost: set[int] = set()
    while not ended.wait(WATCH_SECONDS) or (first and lost < everyone - {0}):
        if failed.is_set():
            return
        try:
            with multihost_utils.live_devices(jax.devices()) as devices:
                lost = everyone - {device.process_index for device in devices}
        except multihost_utils.ProcessFailureError as error:  # during the query
            lost = {device.process_index for device in error.failed_devices}
        except Exception:  # several kinds, if JAX's service is gone: JAX aborts this process soon
            time.sleep(1)
        if lost and not ended.wait(1):  # it may just have left at the end of the run
            names = ", ".join(map(str, sorted(lost)))
            _end(
                f"process {names} of {len(everyone)} is lost; check its output and its machine, then rerun the same "
                "command in all processes to resume from the last checkpoint",
                LOST,
            )
