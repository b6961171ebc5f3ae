"""The number of processors that a process may use."""

import os

import pytest

from vgg_jax.data import processors


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_container_quota_limits_the_processors(quota, expected, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(processors, "CPU_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert processors.num_processors() == expected


def test_affinity_is_the_number_without_a_quota(monkeypatch):
    monkeypatch.setattr(processors, "CPU_QUOTA", "/nonexistent")
    assert processors.num_processors() == len(os.sched_getaffinity(0))
