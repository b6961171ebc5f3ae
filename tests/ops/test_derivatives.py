"""All derivative transformations of the fast convolution and dense product against those of XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.conftest import relative_error
from tests.ops.reference import ROUNDING, normal
from vgg_jax.ops import conv3x3 as convolution
from vgg_jax.ops import methods
from vgg_jax.ops.bilinear import conv_by_xla
from vgg_jax.ops.conv3x3 import conv3x3
from vgg_jax.ops.dense import dense_product

ALL = (0, 1, 2)


def cubes(f):
    """Return a function whose gradient and Hessian depend on all arguments of `f`."""
    return lambda *arguments: (f(*arguments) ** 3).sum()


def norm_of_gradient(f):
    return lambda *arguments: sum((g**2).sum() for g in jax.grad(cubes(f), tuple(range(len(arguments))))(*arguments))


# From a function of (maps or rows, kernel, bias), primals and tangents to what the transformation gives.
TRANSFORMATIONS = {
    "jvp": lambda f, primals, tangents: jax.jvp(f, primals, tangents),
    "jvp of the kernel": lambda f, primals, tangents: jax.jvp(
        lambda k: f(primals[0], k, primals[2]), primals[1:2], tangents[1:2]
    ),
    "linearize": lambda f, primals, tangents: jax.linearize(f, *primals)[1](*tangents),
    "jacfwd": lambda f, primals, _: jax.jacfwd(f, ALL)(*primals),
    "jacrev": lambda f, primals, _: jax.jacrev(f, ALL)(*primals),
    "forward over reverse": lambda f, primals, tangents: jax.jvp(jax.grad(cubes(f), ALL), primals, tangents),
    "reverse over reverse": lambda f, primals, _: jax.grad(norm_of_gradient(f), ALL)(*primals),
    "vmap of grad": lambda f, primals, _: jax.vmap(
        jax.grad(lambda x, *others: cubes(f)(x[None], *others), ALL), (0, None, None)
    )(*primals),
    "vmap of grad over kernels": lambda f, primals, tangents: jax.vmap(jax.grad(cubes(f), ALL), (None, -1, None))(
        primals[0], jnp.stack([primals[1], tangents[1]], -1), primals[2]
    ),
    "vmap of grad over both": lambda f, primals, tangents: jax.vmap(jax.grad(cubes(f), ALL), (1, 0, None))(
        jnp.stack([primals[0], tangents[0]], 1), jnp.stack([primals[1], tangents[1]]), primals[2]
    ),
    "checkpoint": lambda f, primals, _: jax.grad(cubes(jax.checkpoint(f)), ALL)(*primals),
    "linear transpose": lambda f, primals, tangents: jax.linear_transpose(
        lambda x: f(x, primals[1], 0 * primals[2]), primals[0]
    )(f(*tangents)),
    "transpose of the gradient": lambda f, primals, tangents: jax.linear_transpose(
        lambda dy: jax.vjp(f, *primals)[1](dy), f(*primals)
    )(tangents),
}


def check(transformation, fast, plain, shapes):
    primals, tangents = (
        tuple(jnp.asarray(normal(*shape, seed=seed + i)) for i, shape in enumerate(shapes)) for seed in (0, 3)
    )
    results = [
        jax.jit(lambda p, t, f=f: TRANSFORMATIONS[transformation](f, p, t))(primals, tangents) for f in (fast, plain)
    ]
    assert len(jax.tree.leaves(results[0])) == len(jax.tree.leaves(results[1]))
    assert relative_error(*results) < ROUNDING


@pytest.fixture
def winograd_in_bands(winograd, monkeypatch):
    monkeypatch.setattr(methods, "SMALLEST_BAND", 8)


SHAPES = {"winograd": (2, 5, 4, 5), "im2col": (2, 3, 2, 1), "tiny": (2, 2, 1, 2)}
# Maps of at most 2x2 are computed by operations of JAX, so two transformations suffice.
CASES = [(t, method) for t in TRANSFORMATIONS for method in SHAPES if method != "tiny" or " over reverse" in t]


@pytest.mark.parametrize(("transformation", "method"), CASES)
def test_conv3x3_has_every_derivative(transformation, method, x64, winograd_in_bands):
    shape = SHAPES[method]
    check(transformation, conv3x3, conv_by_xla, (shape, (3, 3, shape[-1], 2), (2,)))


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_dense_product_has_every_derivative(transformation, x64, monkeypatch):
    monkeypatch.setattr("vgg_jax.ops.dense.ROWS", 3)
    check(transformation, lambda x, k, b: dense_product(x, k) + b, lambda x, k, b: x @ k + b, ((2, 6), (6, 4), (4,)))


@pytest.mark.parametrize(
    "transformation", ["jvp", "forward over reverse", "reverse over reverse", "vmap of grad", "checkpoint"]
)
def test_derivatives_take_the_fast_path(transformation, winograd):
    """A CPU gets no convolution of XLA; a GPU gets nothing else."""
    primals = tangents = (jnp.ones((2, 5, 6, 5)), jnp.ones((3, 3, 5, 2)), jnp.ones(2))
    traced = jax.jit(lambda p, t: TRANSFORMATIONS[transformation](conv3x3, p, t)).trace(primals, tangents)
    assert "method=winograd" in str(traced.jaxpr)
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in on_gpu
    assert "stablehlo.dot_general" not in on_gpu


def test_reverse_mode_computes_all_gradients_at_once(winograd):
    primals = (jnp.ones((2, 5, 6, 5)), jnp.ones((3, 3, 5, 2)), jnp.ones(2))
    jaxpr = str(jax.make_jaxpr(jax.grad(cubes(conv3x3), ALL))(*primals))
    assert jaxpr.count("conv3x3_gradients[") == 1
    assert "conv3x3_product" not in jaxpr
    assert "conv3x3_kernel_gradient" not in jaxpr


def test_conv3x3_differentiates_under_shard_map(x64, winograd):
    """Each device has a part of the batch; the kernel, the same on all devices, gets the sum of their gradients."""
    mesh = Mesh(jax.devices()[:2], ("batch",))
    primals = (normal(4, 5, 6, 5), normal(3, 3, 5, 2, seed=1), normal(2, seed=2))
    parts = PartitionSpec("batch")

    def loss(x, kernel, bias, conv=conv3x3):
        return jax.lax.psum(cubes(conv)(x, kernel, bias), "batch")

    sharded = jax.shard_map(
        jax.grad(loss, ALL),
        mesh=mesh,
        in_specs=(parts, PartitionSpec(), PartitionSpec()),
        out_specs=(parts, PartitionSpec(), PartitionSpec()),
    )
    expected = jax.grad(cubes(conv_by_xla), ALL)(*primals)
    for actual, gradient in zip(jax.jit(sharded)(*primals), expected, strict=True):
        assert relative_error(actual, gradient) < ROUNDING


def test_symbolic_batch_takes_the_method_of_its_size(monkeypatch):
    """An exported program has the bits of Winograd's algorithm for two images and more, and for one those of XLA."""
    monkeypatch.setattr(convolution, "SMALLEST_WORK", 2 * 8 * 8 * 9 * 10)
    random = np.random.default_rng(0)
    kernel, bias = random.standard_normal((3, 3, 5, 2), np.float32), random.standard_normal(2, np.float32)
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 8, 8, 5"), jnp.float32)
    fixed = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (kernel, bias)]
    exported = jax.export.export(jax.jit(lambda *a: conv3x3(*a)), platforms=("cpu", "cuda"))(images, *fixed)
    for count in (1, 2, 3):
        x = random.standard_normal((count, 8, 8, 5), np.float32)
        by_winograd = jax.jit(lambda *a: convolution.conv_by_method(*a, method="winograd"))(x, kernel, bias)
        by_xla = jax.jit(convolution.conv_by_xla)(x, kernel, bias)
        assert not np.array_equal(by_winograd, by_xla)
        np.testing.assert_array_equal(exported.call(x, kernel, bias), by_xla if count == 1 else by_winograd)


def test_symbolic_batch_keeps_winograd_if_one_image_repays_it(monkeypatch):
    (n,) = jax.export.symbolic_shape("n")
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 8, 8, 5), (3, 3, 5, 2), (2,))]
    for smallest, method in ((8 * 8 * 9 * 10, "winograd"), (8 * 8 * 9 * 10 + 1, "conv_general_dilated")):
        monkeypatch.setattr(convolution, "SMALLEST_WORK", smallest)
        assert method in str(jax.make_jaxpr(lambda *a: conv3x3(*a))(*arguments))
