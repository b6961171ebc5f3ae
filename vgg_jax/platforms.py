"""The platforms that JAX can find here, known without importing JAX, which reads its settings when it is imported."""

import importlib.metadata
import importlib.util
import os


def has_accelerator() -> bool:
    """Return whether JAX has a plug-in or a library for an accelerator that it may use.

    A TPU host has libtpu, which is no plug-in of JAX: it needs no entry point.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    if importlib.metadata.entry_points(group="jax_plugins") or os.environ.get("TPU_LIBRARY_PATH"):
        return True
    return any(importlib.util.find_spec(module) for module in ("jax_plugins", "libtpu"))


def log_level() -> str:
    """Return the value of TF_CPP_MIN_LOG_LEVEL for the commands: the lowest level of XLA's messages that appears.

    On a CPU, XLA logs an error for each program that it loads from the cache, so only fatal errors appear. On an
    accelerator errors appear too, because NCCL's failures are among them.
    """
    return "2" if has_accelerator() else "3"
