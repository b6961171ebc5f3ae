"""The settings of the process: the allocator and the compilation cache."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys

import jax
import pytest

from vgg_jax import runtime
from vgg_jax.platforms import has_accelerator, log_level
from vgg_jax.runtime import configure, keep_freed_memory, use_compilation_cache

PAGES = 2**28 // 4096  # pages of the array below
# The system provides pages at the first write and counts a fault for each; huge pages cause fewer faults.
CODE = """
import importlib.metadata, resource, sys
importlib.metadata.entry_points = lambda **group: ()  # hide plug-ins that are installed here
import jax, jax.numpy as jnp, numpy as np
from vgg_jax.runtime import keep_freed_memory, placed

if sys.argv[1] != "return":
    assert keep_freed_memory(one_arena=sys.argv[1] == "one arena")
program = jax.jit(lambda x: (x @ x.T).sum())  # the product is a temporary array of 2**28 bytes
x = jnp.ones((2**13, 8))
if sys.argv[1] == "copied input":
    x = np.ones(2**22 + 1, np.float32)[1:].reshape(2**13, 512)  # at an address that JAX has to copy from
counts = []
for _ in range(3):
    program(placed(x)).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[2] - counts[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of the GNU C library's allocator")
def test_second_run_of_a_program_takes_no_new_pages():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("one arena", "several arenas", "copied input", "return")
    }
    assert max(faults[how] for how in ("one arena", "several arenas", "copied input")) < PAGES / 10
    if jax.__version_info__ < (0, 12):
        assert faults["return"] > PAGES / 2  # otherwise keep_freed_memory is not needed any more
    else:
        assert faults["return"] < PAGES / 100  # XLA itself takes huge pages: 128 of 2 MiB for the array


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of the GNU C library's allocator")
def test_memory_is_kept_without_mallinfo2():
    """The GNU C library has it from version 2.33 on."""
    code = """
import importlib.metadata, sys
importlib.metadata.entry_points = lambda **group: ()  # hide plug-ins that are installed here
import jax
from vgg_jax import runtime
def missing():
    raise AttributeError("mallinfo2")
runtime._resident_and_not_allocated = missing
assert runtime.keep_freed_memory()
assert runtime.free_bytes() == sys.maxsize
assert not jax.config.values["jax_cpu_enable_async_dispatch"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_allocator_is_unchanged_with_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [f"a plug-in of {group}"])
    keep_freed_memory.cache_clear()
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("hint", "level"), [("libtpu", "2"), ("jax_plugins", "2"), ("TPU_LIBRARY_PATH", "2"), ("cpu", "3"), ("", "3")]
)
def test_errors_of_xla_appear_on_accelerators(hint, level, monkeypatch):
    """A TPU host has libtpu, and a plug-in may be a module without an entry point."""
    find_spec = importlib.util.find_spec
    names = ("libtpu", "jax_plugins")
    found = {"cpu": names}.get(hint, (hint,))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in found or None if name in names else find_spec(name)
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu" if hint == "cpu" else "")
    if hint == "TPU_LIBRARY_PATH":
        monkeypatch.setenv(hint, "/libtpu.so")
    assert log_level() == level
    assert has_accelerator() == (level == "2")


@pytest.fixture
def updates(monkeypatch):
    """Return the settings of JAX that a test changes; JAX itself keeps its own."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    return settings


def test_all_programs_are_cached_in_the_home_directory(updates):
    use_compilation_cache()
    assert updates == {
        "jax_compilation_cache_dir": os.path.join(os.path.expanduser("~"), ".cache", "vgg_jax", "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }


def test_variables_of_the_environment_override_the_cache(updates, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "2")
    use_compilation_cache()
    assert not updates


def test_configure_sets_the_allocator_and_the_cache(updates, monkeypatch):
    calls = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: calls.append("kept"))
    configure()
    assert calls == ["kept"]
    assert "jax_compilation_cache_dir" in updates


def test_configure_silences_warnings_of_libraries():
    """Orbax warns four times when a network is loaded from a run; its errors still appear."""
    code = """
from absl import logging
from vgg_jax.runtime import configure
configure()
logging.warning("a warning")
logging.error("an error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "an error" in done.stderr
    assert "a warning" not in done.stderr
