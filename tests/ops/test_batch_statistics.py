"""Batch norm's closed form against the older code: over rows, with the gradient of autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.variants import before
from tests.conftest import relative_error
from tests.ops.reference import ROUNDING, normal
from tests.ops.test_derivatives import ALL, TRANSFORMATIONS, check, cubes
from vgg_jax.ops.batch_statistics import FORMS, normalize_by_batch
from vgg_jax.ops.forms import CHOICES, Choice

SHAPES = ((8, 3, 4, 5), (5,), (5,))


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setitem(CHOICES, "batch_norm", Choice(*(request.param,) * 3))


def output(function, running_mean=0.3, **options):
    """Return a function of maps, scale and bias whose output depends on all results of a normalization."""

    def of_three(x, scale, bias):
        y, mean, var = function(x, scale, bias, jnp.full(x.shape[-1], running_mean, x.dtype), 1e-5, **options)
        return y + jnp.sin(mean) * var

    return of_three


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_gradient_equals_autodiff_on_any_devices(devices, form, x64):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    parts, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    primals = [normal(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    placed = [jax.device_put(array, parts if array.ndim == 4 else replicated) for array in primals]

    def value_and_gradients(function):
        return jax.jit(jax.value_and_grad(cubes(output(function)), ALL))

    expected = value_and_gradients(before)(*primals)
    assert relative_error(value_and_gradients(normalize_by_batch)(*placed), expected) < 1e-12


# The result is not linear in the maps, and one image at a time is in "vmap of grad".
FEW = ("forward over reverse", "vmap of grad")


@pytest.mark.parametrize(
    "transformation",
    [pytest.param(t, marks=() if t in FEW else pytest.mark.slow) for t in TRANSFORMATIONS if t != "linear transpose"],
)
def test_batch_norm_has_every_derivative(transformation, x64):
    check(transformation, output(normalize_by_batch), output(before), ((2, 3, 2, 3), (3,), (3,)))


def test_batch_norm_differentiates_under_shard_map(x64):
    """Each device normalizes its part of the batch; the scale, the same on all, gets the sum of their gradients."""
    mesh = Mesh(jax.devices()[:2], ("batch",))
    primals = [normal(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    parts, same = PartitionSpec("batch"), PartitionSpec()

    def loss(*arguments):
        return jax.lax.psum(cubes(output(normalize_by_batch))(*arguments), "batch")

    sharded = jax.shard_map(jax.grad(loss, ALL), mesh=mesh, in_specs=(parts, same, same), out_specs=(parts, same, same))
    x, *vectors = primals
    of_parts = [jax.grad(cubes(output(before)), ALL)(part, *vectors) for part in (x[:4], x[4:])]
    expected = np.concatenate([of_parts[0][0], of_parts[1][0]]), *(of_parts[0][i] + of_parts[1][i] for i in (1, 2))
    assert relative_error(jax.jit(sharded)(*primals), expected) < ROUNDING


def test_groups_have_statistics_of_their_own(x64):
    x, scale, bias = (jnp.asarray(normal(*shape, seed=seed)) for seed, shape in enumerate(SHAPES))
    y, mean, var = normalize_by_batch(x, scale, bias, jnp.zeros(5), 1e-5, groups=4)
    parts = [before(x[i : i + 2], scale, bias, None, 1e-5) for i in range(0, 8, 2)]
    expected = jnp.concatenate([part[0] for part in parts]), *(sum(p[i] for p in parts) / 4 for i in (1, 2))
    assert relative_error((y, mean, var), expected) < ROUNDING


def test_one_pass_variance_keeps_its_digits(monkeypatch):
    """The mean is 1000 times the standard deviation: sums of squares alone would lose all digits."""
    monkeypatch.setitem(CHOICES, "batch_norm", Choice("maps", "maps", "maps"))
    x = 1000 + normal(16, 8, 8, 3)
    normalize = functools.partial(normalize_by_batch, jnp.asarray(x, jnp.float32), jnp.ones(3), jnp.zeros(3))
    _, mean, var = normalize(jnp.full(3, 999.0), 1e-5)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 1, 2)), rtol=1e-4)
    assert (normalize(jnp.zeros(3), 1e-5)[2] >= 0).all()
