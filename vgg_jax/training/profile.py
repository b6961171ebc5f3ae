"""A profile of some steps of a run, in the run's directory."""

import os

import jax

from vgg_jax.console import log, note
from vgg_jax.errors import UserError


class Profile:
    """The trace of the steps that `config.profile` names, written by the first process.

    TensorBoard's profiler and XProf open the run's directory. Perfetto opens `perfetto_trace.json.gz` in it.
    """

    def __init__(self, workdir: str, steps: range | None, start: int, end: int) -> None:
        """Check the steps.

        Args:
          workdir: the directory of the run.
          steps: the steps to profile; None profiles none.
          start: the steps taken before.
          end: the last step of the run.

        Raises:
          UserError: if the run ends before the last of these steps.
        """
        if steps and steps[-1] > end:
            raise UserError(
                f"config.profile is '{steps[0]}:{steps[-1]}', and the last step of the run is {end}; expected steps up "
                "to the last one; set config.profile to other steps"
            )
        if steps and steps[-1] <= start:
            note(f"config.profile names steps up to {steps[-1]}, and the run resumes after step {start}: no profile")
            steps = None
        self._steps, self._workdir, self._active = steps, workdir, False
        self._first = max(steps[0], start + 1) if steps else 0

    @property
    def bounds(self) -> tuple[int, ...]:
        """Return the steps after which the profile starts and ends."""
        return (self._first - 1, self._steps[-1]) if self._steps else ()

    def before(self, step: int) -> None:
        """Start the trace if this is its first step."""
        if self._steps and step == self._first and jax.process_index() == 0:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the calls of Python would fill the trace
            jax.profiler.start_trace(self._workdir, create_perfetto_trace=True, profiler_options=options)
            self._active = True

    def after(self, step: int, result: object) -> None:
        """Wait for the result and write the trace if this is its last step."""
        if self._active and self._steps and step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()
            directory = os.path.join(self._workdir, "plugins", "profile")
            log(f"profile: steps {self._first} to {step}, in {directory} (tensorboard --logdir {self._workdir})")

    def close(self) -> None:
        """Write the trace so far if a run ends within it."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
