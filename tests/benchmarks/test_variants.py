"""The table of the forms of each operation, small and on a CPU."""

import subprocess
import sys

import pytest

from benchmarks import variants


@pytest.mark.slow
def test_variants_prints_a_row_for_each_form(narrow, capsys):
    small = ["--rounds", "1", "--seconds", "0", "--cases", "vgg11_bn:32:2"]
    variants.main([*small, "--parts", "crop", "pool", "norm", "finite"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    forms = {part: [form for _, p, form, *_ in rows if p == part] for part in ("crop", "pool", "norm", "finite")}
    assert forms == {
        "crop": ["call", "slices", "gathers", "products", "selections"],
        "pool": ["call", "slices", "window", "reshape", "index"],
        "norm": ["call", "rows", "two_passes", "maps", "whole", "before"],
        "finite": ["call", "product", "each", "stacked"],
    }
    assert all(float(milliseconds) >= 0 for *_, milliseconds, _ in rows)


def test_variants_imports_without_data_libraries():
    heavy = ("tensorflow_datasets", "grain", "ml_collections", "torch")
    code = f"import sys, benchmarks.variants; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
