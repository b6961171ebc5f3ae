"""Settings of the whole process: the allocator of the C library, the compilation cache, compiler options."""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from typing import Any

import jax
import numpy as np

from vgg_jax.platforms import has_accelerator

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # the numbers of <malloc.h>
MOST_FREE = 256 * 2**20  # bytes of freed memory that the process keeps when JAX has compiled a program
MADV_HUGEPAGE = 14  # the number of <sys/mman.h>
HUGE_PAGE = 2**21  # bytes
HUGE_RANGE = 2**32  # addresses for which huge pages are requested
COPIED_AT_ONCE = 2**16  # bytes of an array that JAX copies in the thread that calls a program (jaxlib: below 100 KiB)
COMPILATION_CACHE = os.path.join("~", ".cache", "vgg_jax", "compiled")
VARIABLE = "VGG_JAX_SETTINGS"  # "off": none of the settings below are applied


def settings_are_on() -> bool:
    """Return whether the settings may be applied: the environment variable VGG_JAX_SETTINGS is not `off`.

    Any other value than on and off is reported by a warning, and means on.
    """
    value = os.environ.get(VARIABLE, "on")
    if value not in ("on", "off"):
        warnings.warn(f"the environment variable {VARIABLE} is {value!r}; expected on or off: unset it", stacklevel=2)
    return value != "off"


@functools.cache
def apply_defaults() -> bool:
    """Apply the settings that a user's program gets when it imports `VGG`, `Network` or `load`.

    On a host without accelerators, keep freed memory (see `keep_freed_memory`), cache the programs that compile in more
    than a tenth of a second, and silence XLA's report of each cached program. On other hosts, or if `settings_are_on`
    returns False, do nothing. A second call does nothing.

    Returns:
      Whether the settings have been applied.
    """
    if not settings_are_on() or has_accelerator():
        return False
    if not keep_freed_memory.cache_info().currsize:  # a command may have chosen
        keep_freed_memory()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        use_compilation_cache(shortest=0.1)
    with contextlib.suppress(ImportError, AttributeError):
        from jaxlib import utils

        # XLA:CPU logs two errors of 2 kB for each program that it loads from the cache, which are false: the program
        # was compiled on this machine. JAX reads TF_CPP_MIN_LOG_LEVEL when it is imported, which may be earlier.
        utils.absl_set_min_log_level(3)
    return True


def configure() -> None:
    """Apply all settings that a command shares with the others; call it before JAX runs its first program.

    These are `silence_libraries` and, if `settings_are_on` returns True, `keep_freed_memory` and
    `use_compilation_cache`.
    """
    silence_libraries()
    if settings_are_on():
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


def use_compilation_cache(shortest: float = 0.0) -> None:
    """Keep compiled programs in `~/.cache/vgg_jax/compiled`, so that the next process loads them.

    The environment variables of JAX take precedence: JAX_COMPILATION_CACHE_DIR names another directory, and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS excludes programs that compile faster. Without a directory that can be
    written, programs are compiled and not cached.

    Args:
      shortest: the compilation time in seconds from which programs are cached. By default all are: JAX skips programs
        that compile in less than a second, and the small programs of a command add up to a second.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = os.path.expanduser(COMPILATION_CACHE)
        with contextlib.suppress(OSError):
            os.makedirs(directory, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            return  # JAX would warn at each program
        jax.config.update("jax_compilation_cache_dir", directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


@functools.cache
def keep_freed_memory(one_arena: bool = False) -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    XLA:CPU allocates the temporary arrays of a program anew in each run. If they were returned in between, the system
    clears them page by page: a sixth of a training step of VGG-16 at 224x224, batch 8, and a quarter of inference by
    VGG-16-BN at 32x32, batch 64 (2 cores of an EPYC).

    On a CPU, JAX then runs a program in the thread that calls it, as NumPy and PyTorch do: the option
    jax_cpu_enable_async_dispatch is off. Asynchronous dispatch allocates the temporary arrays of a program while those
    of the program before still exist: training VGG-16 at 224x224, batch 8, held 7.3 GiB instead of 3.9 GiB. It also
    allocates them in threads, whose arenas return large arrays to the system.

    New memory comes in huge pages of 2 MiB where Linux gives them on request (transparent_hugepage `madvise`), so that
    the processor looks up fewer addresses: 25.1 instead of 22.9 images/s in inference by VGG-16 at 224x224, batch 8.

    Memory does not pile up over programs: when JAX has compiled a program or loaded it from the cache, freed memory
    above 256 MiB is returned. In between, the process holds what its programs have needed so far.

    Call this before JAX runs its first program. It needs the GNU C library, and does nothing if JAX may use an
    accelerator.

    Args:
      one_arena: let all threads share the arena of the main thread instead, and keep the asynchronous dispatch. This is
        for a process that allocates large arrays in several threads, such as the backward pass of PyTorch. Threads that
        compile then wait for one lock.

    Returns:
      Whether freed memory is kept.
    """
    if has_accelerator():
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        settings = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), *([(M_ARENA_MAX, 1)] if one_arena else [])]
        kept = all(mallopt(*setting) for setting in settings)
        jax.monitoring.register_event_duration_secs_listener(_bound_freed_memory)
        free_bytes()  # what is resident now does not count later
        _request_huge_pages()
        if not one_arena:
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        return kept
    return False


class _Mallinfo2(ctypes.Structure):
    """The struct mallinfo2 of <malloc.h>; uordblks is the number of allocated bytes."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]  # noqa: SIM905, RUF100 - one line


def free_bytes() -> int:
    """Return the resident bytes that the C library holds free; the largest number if it cannot tell.

    All that is resident and not allocated counts, except for what was so before the settings were applied, such as the
    code of the libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        return _resident_and_not_allocated() - _baseline()
    return sys.maxsize


def _resident_and_not_allocated() -> int:
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _Mallinfo2
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident - int(mallinfo2().uordblks)


@functools.cache
def _baseline() -> int:
    """Return what was resident and not allocated at the first call."""
    return _resident_and_not_allocated()


def _request_huge_pages() -> None:
    """Request huge pages for the addresses that the heap grows into.

    The heap grows by HUGE_RANGE bytes, which stay without memory until they are used. Nothing is requested if the
    addresses of the process are limited (ulimit -v).
    """
    import resource  # here, because Windows lacks it

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(HUGE_RANGE):
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(start, (block + HUGE_RANGE - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(block)


def _bound_freed_memory(event: str, duration_secs: float, **_: Any) -> None:
    """Return freed memory to the system if JAX has compiled or loaded a program and more than MOST_FREE is free."""
    if event == "/jax/core/compile/backend_compile_duration" and free_bytes() > MOST_FREE:
        return_freed_memory()


def return_freed_memory() -> None:
    """Return freed memory to the system, so that the next phase of a run does not add to it.

    Compilation, training and evaluation each need large temporary arrays, which seldom fit into the memory that
    another phase has left. Without this call the phases of VGG-16-BN on CIFAR-10, batch 128, together held 4.9 GiB; the
    largest phase needs 1.8 GiB. The next step gets new pages from the system. Without the GNU C library this does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        if keep_freed_memory.cache_info().currsize:
            _request_huge_pages()  # the end of the heap has been returned


def placed(arrays: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Return the inputs of a program as a tree of arrays on the devices; on a CPU wait for the copies.

    A program whose inputs are still being copied runs in a thread of XLA instead of the calling one (see
    `keep_freed_memory`), and the arenas of most threads return large arrays to the system: in inference by VGG-16 with
    8 images of 224x224 that are a NumPy array, 95,000 pages in each run, and 18 instead of 23 images/s.

    A small array of NumPy is returned as it is: the call of a program copies it at once.
    """
    if sharding is None and isinstance(arrays, np.ndarray) and arrays.nbytes <= COPIED_AT_ONCE:
        return arrays
    if sharding is None and isinstance(arrays, jax.Array) and not isinstance(arrays, jax.core.Tracer):
        return arrays.block_until_ready() if jax.default_backend() == "cpu" else arrays  # less Python than below
    found = jax.device_put(arrays, sharding)
    return jax.block_until_ready(found) if jax.default_backend() == "cpu" else found


def compiler_options() -> dict[str, Any] | None:
    """Return the options with which `jax.jit` compiles the steps: on a CPU, the schedule that needs the least memory.

    The default schedule of XLA:CPU computes values of the backward pass during the forward pass and keeps them. With
    this schedule, evaluation by VGG-16-BN at 32x32, batch 512, needs 329 instead of 841 MiB.

    Returns:
      The options, or None on an accelerator.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else None
