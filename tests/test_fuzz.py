"""Damaged files of every kind give a result or one line, within seconds and without much memory; see `tests.fuzz`."""

import subprocess
import sys

import pytest

from tests.fuzz import KINDS

COUNTS = {"run": 100, "config": 200}  # each takes longer than a file of weights


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        pytest.param(tuple(KINDS), 30, id="all"),
        *(pytest.param((kind,), COUNTS.get(kind, 500), id=kind, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_mutated_files_are_read_or_refused(kinds, count):
    """In a process of its own, which may run out of memory, hang or crash without ending the tests."""
    command = [sys.executable, "-m", "tests.fuzz", *kinds, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    for kind in kinds:
        assert f"{kind}: {count} mutations" in done.stdout
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
