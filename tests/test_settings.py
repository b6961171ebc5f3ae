"""The settings that a user's program gets at the first import of VGG, Network or load, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

# The plug-ins that are installed here are hidden, as in tests/test_runtime.py.
START = """
import importlib.metadata, os, sys
importlib.metadata.entry_points = lambda **group: ()
import jax, jax.numpy as jnp
"""
STATE = """
from vgg_jax import VGG, runtime
kept = runtime.keep_freed_memory.cache_info().currsize
print(jax.config.values["jax_compilation_cache_dir"], kept, jax.config.values["jax_cpu_enable_async_dispatch"])
"""
RUN = """
import vgg_jax.model
print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((64, 64))).sum())
"""
# Each program needs a temporary array of another size, up to 512 MiB. Together they need 2.8 GiB.
PILE = """
import time
from vgg_jax import VGG
for side in range(5000, 11600, 600):
    jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((side, 8))).block_until_ready()
    held = jax.jit(jnp.ones, static_argnums=0)((side, 500)).block_until_ready()  # lies between free blocks
time.sleep(0.5)  # XLA frees the last array in a thread of its own
jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
with open("/proc/self/status") as file:
    print(*(line.split()[1] for line in file if line.startswith(("VmHWM", "VmRSS"))))
"""


def run(code, home, **variables):
    """Return the output of a program that has the environment of a user: no variable of JAX's cache."""
    removed = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL", "VGG_JAX_SETTINGS")
    environment = {key: value for key, value in os.environ.items() if key not in removed}
    environment |= {"HOME": str(home), **variables}
    done = subprocess.run([sys.executable, "-c", START + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_import_applies_the_settings(tmp_path):
    assert run(STATE, tmp_path)[0] == f"{tmp_path}/.cache/vgg_jax/compiled 1 False"


def test_one_variable_undoes_the_settings(tmp_path):
    commands = "from vgg_jax.runtime import configure\nconfigure()\n"
    assert run(commands + STATE, tmp_path, VGG_JAX_SETTINGS="off")[0] == "None 0 True"
    assert not (tmp_path / ".cache").exists()


def test_unknown_value_of_the_variable_is_reported(tmp_path):
    assert "VGG_JAX_SETTINGS is '0'; expected on or off" in run(STATE, tmp_path, VGG_JAX_SETTINGS="0")[1]


def test_accelerator_hosts_get_no_settings(tmp_path):
    plugin = "importlib.metadata.entry_points = lambda **group: ('a plug-in',)\n"
    assert run(plugin + STATE, tmp_path)[0] == "None 0 True"


def test_cache_of_the_user_stays(tmp_path):
    mine = f"jax.config.update('jax_compilation_cache_dir', '{tmp_path}/mine')\n"
    assert run(mine + STATE, tmp_path)[0] == f"{tmp_path}/mine 1 False"


def test_cache_that_cannot_be_written_is_left_out(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert run(STATE, tmp_path)[0] == "None 1 False"


def test_cached_programs_cause_no_output(tmp_path):
    """XLA would log two errors for each program that it loads, because jax is imported first."""
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, second = (run(RUN, tmp_path, **everything) for _ in range(2))
    assert list((tmp_path / ".cache" / "vgg_jax" / "compiled").glob("*-cache"))
    assert first == second and not second[1]


def test_damaged_cache_is_harmless(tmp_path):
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, _ = run(RUN, tmp_path, **everything)
    for path in (tmp_path / ".cache" / "vgg_jax" / "compiled").glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    assert run(RUN, tmp_path, **everything)[0] == first


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of the GNU C library's allocator")
def test_freed_memory_does_not_pile_up(tmp_path):
    """After eleven programs of different sizes and a small one, the process holds less than the largest needs."""
    peak, now = (int(kib) / 1024 for kib in run(PILE, tmp_path)[0].split())
    largest = 11000**2 * 4 / 2**20  # MiB; without the bound the process holds 797 at the end
    assert peak < 1.5 * largest + 250  # 250 MiB: Python, JAX and the arrays that live
    assert now < 250 + 256
