"""The parts of the comparison of LPIPS with PyTorch, small."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import lpips as benchmark
from benchmarks.lpips import Times


def times(torch, channels_last, ours, cached):
    names, seconds = (*benchmark.TORCH_ARMS, "ours", "ours_cached"), (torch, channels_last, ours, cached)
    return {name: Times(wall, 2 * wall) for name, wall in zip(names, seconds, strict=True)}


def test_row_has_the_median_ratio_of_the_best_arm():
    """The rounds' ratios are 3, 4 and 1; that of the medians is 2.5. In the median, channels_last is faster."""
    results = [times(9, 3, 1, 0.5), times(9, 8, 2, 1), times(1, 5, 5, 5)]
    cells = [cell.strip() for cell in benchmark.row("64:16", results).split("|")[1:-1]]
    assert cells[:6] == ["64:16", "5.000 (torch_channels_last)", "2.000", "1.000", "3.00", "2.00"]
    assert cells[6:] == ["10.000 (torch_channels_last)", "4.000", "2.000", "3.00", "2.00"]
    assert len(cells) == len(benchmark.header().splitlines()[0].split("|")) - 2


def test_rounds_alternate_the_order_of_the_arms():
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    results = benchmark.measure(arms, 2)
    assert calls == ["a", "b", "c", "c", "b", "a"]
    assert all(times.wall >= 0 and times.processor >= 0 for round in results for times in round.values())


def test_noisy_pairs_stay_in_range():
    first, second = benchmark.make_pairs(32, 2)
    assert first.shape == second.shape == (2, 32, 32, 3)
    assert np.abs(second).max() <= 1
    assert 0.1 < np.abs(first - second).mean() < 0.2


@pytest.mark.slow  # the full network
def test_arms_return_the_same_distances_and_gradients():
    arms = benchmark.make_arms(32, 1, threads=1)
    gradients = {name: np.asarray(arm()[1]) for name, arm in arms.items()}
    expected = gradients["torch"].transpose(0, 2, 3, 1)
    for name in ("ours", "ours_cached"):
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_script_finds_the_package_and_not_itself():
    """Python puts the folder of a script first on the path, where the name `lpips` is the script."""
    code = "import runpy, sys; from importlib.util import find_spec; sys.path.insert(0, {0!r}); "
    code += "runpy.run_path({1!r}, run_name='benchmark'); print(find_spec('lpips').origin)"
    command = [sys.executable, "-c", code.format(os.path.dirname(benchmark.__file__), benchmark.__file__)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert found.endswith(os.path.join("lpips", "__init__.py"))
