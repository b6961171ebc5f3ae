"""The benchmark of the convolutions: all methods compute the same, and the file has their figures."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import convolutions
from vgg_jax.ops import methods, winograd


@pytest.fixture
def two_layers(monkeypatch):
    monkeypatch.setattr(convolutions, "TABLE_1", {"D": ((4,), (8,))})


def test_shapes_are_those_of_the_network():
    found = convolutions.shapes("224:8")
    assert [shape.name for shape in found[:3]] == ["224x224, 3 to 64", "224x224, 64 to 64", "112x112, 64 to 128"]
    assert found[1].flops == 8 * 2 * 224**2 * 9 * 64 * 64
    assert len(found) == 9


@pytest.mark.parametrize("side", [6, 2])
def test_methods_compute_the_same(side):
    shape = convolutions.Shape(2, side, 3, 4)
    with jax.enable_x64(True):
        values = convolutions.arguments(shape, np.float64)
        expected, *others = (method(*values[:3]) for method in convolutions.arms(shape).values())
    assert others
    for actual in others:
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_tiles_of_every_size_are_exact_in_float64():
    with jax.enable_x64(True):
        *values, _ = convolutions.arguments(convolutions.Shape(1, 7, 2, 3), np.float64)
        expected = convolutions.conv_by_xla(*values)
        for rows, points in convolutions.POINTS.values():
            by_tiles = jax.jit(functools.partial(convolutions.by_tiles, rows=rows, points=points))
            np.testing.assert_allclose(by_tiles(*values), expected, atol=1e-11)


def test_matrices_are_those_of_vgg_jax():
    _, points = convolutions.POINTS["F(4x4): 0, +-sqrt(1/2), +-sqrt(2)"]
    for actual, expected in zip(convolutions.matrices(4, points), winograd.MATRICES[winograd.ROWS], strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.slow
def test_file_has_the_figures_of_each_part(two_layers, tmp_path, capsys):
    path = tmp_path / "figures.json"
    convolutions.main(["--cases", "4:1", "--rounds", "1", "--json", str(path)])
    found = json.loads(path.read_text())["results"]["4:1"]
    assert list(found) == ["forward", "backward", "error"]
    assert list(found["forward"]["layers"][1]["methods"]) == ["xla", "karatsuba"]
    rate = found["forward"]["layers"][0]["methods"]["chosen"]
    assert rate["range"][0] <= rate["gflops"] <= rate["range"][1]
    assert all(0 < error < 1e-4 for layer in found["error"]["layers"] for error in layer["errors"].values())
    assert found["error"]["versions"]["jax"] == jax.__version__
    assert "4:1 backward  2x2, 4 to 8  xla" in capsys.readouterr().out
    convolutions.main(["--cases", "4:2", "--parts", "error", "--json", str(path)])
    assert list(json.loads(path.read_text())["results"]) == ["4:1", "4:2"]


def test_whole_map_differs_from_bands():
    shape = convolutions.Shape(12, 32, 8, 8)
    values = convolutions.arguments(shape)
    limit = methods.SMALLEST_BAND
    loops = {
        name: "while" in convolutions.program(shape, name, method, "forward", values).as_text()
        for name, method in convolutions.arms(shape).items()
        if name in ("winograd4", "bands")
    }
    assert loops == {"winograd4": False, "bands": True}
    assert limit == methods.SMALLEST_BAND
