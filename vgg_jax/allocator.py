"""The C library's allocator: keep freed memory from step to step, return it between phases of a run."""

import contextlib
import ctypes
import importlib.metadata

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, where JAX has no plug-in for an accelerator; returns whether it does.

    XLA:CPU allocates the temporary arrays of a program anew each time it runs. Where they were given back in between,
    they come from the system page by page, cleared: that is a sixth of a training step of VGG-16 at 224x224, batch 8,
    and a quarter of inference by VGG-16-BN at 32x32, batch 64 (2 cores of an EPYC). The process then holds as much as
    it has ever needed at once.

    To be called before JAX starts its threads, each of which would have memory of its own. Needs the GNU C library.
    """
    if importlib.metadata.entry_points(group="jax_plugins"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return all(mallopt(*setting) for setting in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)))
    return False


def return_freed_memory() -> None:
    """Return the memory that is free now to the system, so that the next phase of a run does not add to the last one.

    Compilation, training and evaluation each need large temporary arrays. Kept ones of one phase seldom fit the next:
    together they held 4.9 GiB where the largest phase needs 1.8 (VGG-16 with batch norm on CIFAR-10, batch 128). The
    first step afterwards gets its pages anew. Does nothing without the GNU C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
