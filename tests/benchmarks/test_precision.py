"""The precision benchmark on a narrow network: products rounded as on a GPU or TPU have the errors of their formats."""

import sys

import pytest

from benchmarks import precision


@pytest.mark.slow
def test_errors_follow_the_mantissa(monkeypatch, capsys, narrow):
    arguments = ["precision.py", "--networks", "vgg16", "--size", "32", "--batch", "2", "--simulate"]
    monkeypatch.setattr(precision, "NETWORKS", {"vgg16": dict(depth=11, hidden=(16,), num_classes=5, pool_size=1)})
    monkeypatch.setattr(sys, "argv", arguments)
    precision.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| vgg16")]
    errors = {row[1].split(" (")[0]: float(row[2]) for row in rows}
    float32 = errors["precision=highest"]
    assert float32 < 5e-6
    assert errors["bfloat16, 6 products"] < 5e-6
    assert float32 < errors["bfloat16, 3 products"] < 1e-4
    assert 1e-4 < errors["TF32"] < errors["bfloat16"] < 3e-2
