"""Settings of the whole process: the allocator of the C library, the compilation cache, compiler options."""

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from typing import Any

import jax

from vgg_jax.platforms import has_accelerator

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # the numbers of <malloc.h>
COMPILATION_CACHE = os.path.join("~", ".cache", "vgg_jax", "compiled")


def configure() -> None:
    """Apply all settings that a command shares with the others; call it before JAX runs its first program."""
    silence_libraries()
    keep_freed_memory()
    use_compilation_cache()


def silence_libraries() -> None:
    """Silence the warnings of other libraries: the commands themselves report what a user has to change.

    JAX's own warnings remain, such as that of a GPU that JAX cannot use. So do Python's warnings if the option -W or
    PYTHONWARNINGS asks for them.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # the logger of Orbax and TFDS, whose level is its own
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger().setLevel(logging.CRITICAL)  # all others inherit this level: tensorboardX, Grain, Keras
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def use_compilation_cache() -> None:
    """Keep compiled programs in `~/.cache/vgg_jax/compiled`, so that the next process loads them.

    The environment variables of JAX take precedence: JAX_COMPILATION_CACHE_DIR names another directory, and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS excludes programs that compile faster.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILATION_CACHE))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX skips programs that compile in less than a second. The small ones add up to a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    XLA:CPU allocates the temporary arrays of a program anew in each run. If they were returned in between, the system
    clears them page by page: a sixth of a training step of VGG-16 at 224x224, batch 8, and a quarter of inference by
    VGG-16-BN at 32x32, batch 64 (2 cores of an EPYC). In exchange, the process holds the largest amount of memory that
    it has needed so far.

    Call this before JAX starts its threads: each thread would otherwise get an arena of its own. It needs the GNU C
    library, and does nothing if JAX may use an accelerator.

    Returns:
      Whether freed memory is kept.
    """
    if has_accelerator():
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(mallopt(*setting) for setting in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)))
    return False


def return_freed_memory() -> None:
    """Return freed memory to the system, so that the next phase of a run does not add to it.

    Compilation, training and evaluation each need large temporary arrays, which seldom fit into the memory that
    another phase has left. Without this call the phases of VGG-16-BN on CIFAR-10, batch 128, together held 4.9 GiB; the
    largest phase needs 1.8 GiB. The next step gets new pages from the system. Without the GNU C library this does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compiler_options() -> dict[str, Any] | None:
    """Return the options with which `jax.jit` compiles the steps: on a CPU, the schedule that needs the least memory.

    The default schedule of XLA:CPU computes values of the backward pass during the forward pass and keeps them. With
    this schedule, evaluation by VGG-16-BN at 32x32, batch 512, needs 329 instead of 841 MiB.

    Returns:
      The options, or None on an accelerator.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else None
