"""The growth benchmark on small cells."""

import sys

import pytest

from benchmarks import growth
from benchmarks.throughput_cells import parse_cell


@pytest.mark.slow
def test_table(monkeypatch, capsys):
    """Two real processes run one after the other; the work, time and rate of a row are consistent."""
    cells = [parse_cell("vgg11_bn-32-infer", batch) for batch in (1, 4)]
    monkeypatch.setattr(growth, "SWEEPS", {"batch": cells})
    monkeypatch.setattr(sys, "argv", ["growth.py", "--rounds", "1", "--seconds", "0.1", "--product-size", "128"])
    growth.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vgg11_bn")]
    for line, batch in zip(lines, (1, 4), strict=True):
        network, images, size, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        assert (network, images, size) == ("vgg11_bn, inference", "32x32", str(batch))
        work, milliseconds, rate, share, memory, memory_per_image = (float(f.replace(",", "")) for f in figures)
        assert work == pytest.approx(0.31, abs=0.005)  # 0.153 billion multiply-adds
        assert rate == pytest.approx(work / milliseconds * 1e3, abs=0.5 + 0.05 * rate)  # of rounded figures
        assert share > 0
        assert memory_per_image == pytest.approx(memory / batch, rel=0.01, abs=1)
