"""The allocator: what is freed and allocated again is not cleared by the system again."""

import importlib.metadata
import platform
import subprocess
import sys

import pytest

from vgg_jax.allocator import keep_freed_memory

PAGES = 2**28 // 4096  # of the array below
# The system gives pages when they are first written, and counts them as faults: of huge pages fewer.
CODE = """
import importlib.metadata, resource, sys
importlib.metadata.entry_points = lambda **group: ()  # a plug-in that is installed here is not seen
import jax, jax.numpy as jnp
from vgg_jax.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
program = jax.jit(lambda x: (x @ x.T).sum())  # whose product is a temporary array of 2**28 bytes
x = jnp.ones((2**13, 8))
counts = []
for _ in range(3):
    program(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[2] - counts[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is the GNU C library's allocator that is told")
def test_a_program_that_runs_again_takes_no_new_pages():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["keep"] < PAGES / 10
    assert faults["return"] > PAGES / 2  # else the call is of no use any more


def test_with_an_accelerator_the_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [f"a plug-in of {group}"])
    assert not keep_freed_memory()
