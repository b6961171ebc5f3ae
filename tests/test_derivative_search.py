"""A search for shapes, methods and transformations in which the fast network differs from the plain one."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import random_variables, relative_error
from tests.test_transformations import TRANSFORMATIONS
from vgg_jax import VGG
from vgg_jax.model import FAST, PLAIN, TABLE_1

# The thresholds and fields that select each method for the layers after the first one.
METHODS = {
    "winograd": dict(work=0, band=10**6),
    "winograd in bands": dict(work=0, band=4),
    "xla": dict(work=10**12, band=10**6),
    "1x1": dict(work=0, band=10**6, conv1x1=True, depth=16, final_layer="relu3_3"),
    "tiny": dict(work=0, band=10**6),
}
FLAGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@st.composite
def cases(draw, largest=9):
    """Draw a transformation, a method, the shape of the images, and whether and how batch norm is used."""
    method = draw(st.sampled_from(sorted(METHODS)))
    # The map after pool1 is at most 2x2 if tiny. With 1x1 it is 2x2 after pool2: with two values in all, the result of
    # batch norm in training is constant up to its epsilon, and its derivatives are rounding.
    sides = st.integers(*{"tiny": (4, 5), "1x1": (8, largest)}.get(method, (6, largest)))
    shape = (draw(st.integers(2, 3)), draw(sides), draw(sides), draw(st.sampled_from([1, 3, 5])))
    norm = draw(st.sampled_from(["none", "evaluation", "training"]))
    return draw(st.sampled_from(sorted(TRANSFORMATIONS))), method, shape, norm


@pytest.fixture
def widths_of_six(monkeypatch):
    """Give all convolutions six channels: too many for im2col, except in the first layer."""
    table = {column: tuple(tuple(6 for _ in stage) for stage in stages) for column, stages in TABLE_1.items()}
    monkeypatch.setattr("vgg_jax.model.TABLE_1", table)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return monkeypatch


def check(case, monkeypatch):
    """Compare the fast and the plain network, and count XLA's convolutions in both programs."""
    transformation, method, shape, norm = case
    fields = dict(depth=13, final_layer="relu2_1") | METHODS[method]
    monkeypatch.setattr("vgg_jax.ops.conv3x3.SMALLEST_WORK", fields.pop("work"))
    monkeypatch.setattr("vgg_jax.ops.methods.SMALLEST_BAND", fields.pop("band"))
    model = VGG(
        **fields, num_classes=None, hidden=(), batch_norm=norm != "none", dtype=np.float64, param_dtype=np.float64
    )
    variables = jax.tree.map(lambda a: a + 0.3 * (a.ndim == 1), random_variables(model, *shape[1:]))  # no dead ReLUs
    images, direction = np.random.default_rng(0).standard_normal((2, *shape))

    def logits(model, variables, images):
        if norm == "training":
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]
        return model.apply(variables, images)

    results, texts = [], []
    for layers in (FAST, PLAIN):
        function = functools.partial(logits, model.clone(layers=layers))
        lowered = jax.jit(functools.partial(TRANSFORMATIONS[transformation], function)).lower(
            variables, images, direction
        )
        texts.append(lowered.as_text())
        results.append(lowered.compile()(variables, images, direction))
    fast, plain = (text.count("stablehlo.convolution") for text in texts)
    if method == "xla" and shape[-1] == 5:
        assert fast == plain
    elif method in ("xla", "1x1"):
        assert 0 < fast < plain
    else:
        assert 0 == fast < plain
    assert relative_error(*results) < 1e-12


@pytest.mark.slow
@given(case=cases())
@example(case=("linearize", "winograd", (2, 7, 6, 3), "training"))
@example(case=("forward over reverse", "winograd in bands", (2, 9, 6, 5), "none"))
@example(case=("vmap of grad", "tiny", (2, 5, 4, 1), "evaluation"))
@example(case=("checkpoint", "1x1", (3, 8, 9, 3), "training"))
@example(case=("jacfwd", "xla", (2, 6, 7, 1), "evaluation"))
@settings(FLAGS, max_examples=1)
def test_fast_derivatives_equal_plain_ones(case, x64, widths_of_six):
    check(case, widths_of_six)


@pytest.mark.slow
@given(case=cases(largest=21))
@settings(FLAGS, max_examples=150)
def test_wide_search_of_fast_derivatives(case, x64, widths_of_six):
    check(case, widths_of_six)
