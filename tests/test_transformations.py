"""Transformations of JAX through whole networks: derivatives of the fast layers, and export with symbolic shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.conftest import random_variables, relative_error
from vgg_jax import VGG
from vgg_jax.model import FAST, PLAIN

NETWORK = dict(depth=11, num_classes=5, hidden=(16,), pool_size=1, dtype=jnp.float64, param_dtype=jnp.float64)


def loss(logits, variables, images):
    return (logits(variables, images) ** 2).sum()


def hessian_vector_product(logits, variables, images, direction):
    """Return the product by reverse over reverse mode."""

    def slope(images):
        return (jax.grad(loss, 2)(logits, variables, images) * direction).sum()

    return jax.grad(slope)(images)


# From the logits, the variables, images and a direction of the images to what the transformation gives.
TRANSFORMATIONS = {
    "jvp": lambda f, v, x, t: jax.jvp(functools.partial(f, v), (x,), (t,)),
    "linearize": lambda f, v, x, t: jax.linearize(f, v, x)[1](v, t),
    "jacfwd": lambda f, v, x, t: jax.jacfwd(lambda s: f(v, x + s[0] * t + s[1] * jnp.sin(t)))(jnp.zeros(2)),
    "forward over reverse": lambda f, v, x, t: jax.jvp(functools.partial(jax.grad(loss, (1, 2)), f), (v, x), (v, t)),
    "reverse over reverse": hessian_vector_product,
    "vmap of grad": lambda f, v, x, t: jax.vmap(lambda x: jax.grad(loss, 1)(f, v, x[None]))(x),
    "checkpoint": lambda f, v, x, t: jax.grad(loss, 1)(jax.checkpoint(f), v, x),
}


SHORT = ("forward over reverse", "vmap of grad")  # tests/ops/test_derivatives.py has all for each operation


@pytest.mark.parametrize(
    "transformation", [pytest.param(t, marks=() if t in SHORT else pytest.mark.slow) for t in TRANSFORMATIONS]
)
def test_fast_network_has_the_derivatives_of_plain(transformation, x64, winograd, narrow):
    fast = VGG(**NETWORK, layers=FAST)
    variables = random_variables(fast, 32, 32, 3)
    images, direction = np.random.default_rng(0).standard_normal((2, 2, 32, 32, 3))
    results = [
        jax.jit(functools.partial(TRANSFORMATIONS[transformation], model.apply))(variables, images, direction)
        for model in (fast, fast.clone(layers=PLAIN))
    ]
    assert relative_error(*results) < 1e-12


@pytest.mark.slow
def test_training_loss_has_hessian_vector_products(x64, winograd, narrow):
    """Batch norm by the statistics of the batch, with rematerialization."""
    fast = VGG(**NETWORK, batch_norm=True, remat=True)
    variables = random_variables(fast, 32, 32, 3)
    images, direction = np.random.default_rng(0).standard_normal((2, 4, 32, 32, 3))

    def product(model):
        def logits(variables, images):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

        gradient = functools.partial(jax.grad(loss, 2), logits, variables)
        return jax.jit(lambda: jax.jvp(gradient, (images,), (direction,)))()

    assert relative_error(product(fast), product(fast.clone(layers=PLAIN))) < 1e-9  # batch norm amplifies rounding


SIZES = ("h >= 32", "w >= 32")


@pytest.mark.parametrize(
    ("dimensions", "constraints", "shapes", "fields"),
    [
        ("n, 32, 32, 3", (), [(1, 32, 32, 3), (3, 32, 32, 3)], dict(batch_norm=True)),
        ("n, h, w, 3", SIZES, [(1, 64, 64, 3), (2, 37, 70, 3)], dict(pool_size=7)),
        ("n, h, w, 3", SIZES, [(1, 64, 64, 3), (2, 37, 102, 3)], dict(pool_size=2, hidden=(16, 8), conv_head=True)),
        pytest.param(
            *("1, 32*h, 32*h, 1", (), [(1, 32, 32, 1), (1, 96, 96, 1)], dict(lrn=True, pool_size=2)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("n, h, w, 3", SIZES, [(1, 64, 64, 3), (2, 37, 70, 3)], dict(batch_norm=True, layers=PLAIN)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["batch", "size", "conv head", "multiples", "plain"],
)
def test_export_with_symbolic_shapes(dimensions, constraints, shapes, fields, x64, winograd, narrow):
    """One program for three platforms gives the logits of each fixed shape."""
    model = VGG(**NETWORK | fields)
    variables = random_variables(model, *shapes[0][1:])
    images = jax.ShapeDtypeStruct(export.symbolic_shape(dimensions, constraints=constraints), jnp.float64)
    exported = export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu"))(variables, images)
    for shape in shapes:
        images = np.random.default_rng(0).standard_normal(shape)
        assert relative_error(exported.call(variables, images), jax.jit(model.apply)(variables, images)) < 1e-12


def test_symbolic_size_without_constraints_is_refused(narrow):
    model = VGG(11)
    images = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, 3"), jnp.float32)
    with pytest.raises(ValueError, match=r'"h >= 32" to jax\.export\.symbolic_shape'):
        jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.slow
def test_gradients_export_with_symbolic_shapes(narrow, winograd):
    """Winograd's gradients contain a layout constraint, which export allows on request."""
    model = VGG(**NETWORK | dict(dtype=jnp.float32, param_dtype=jnp.float32, hidden=(512,)), batch_norm=True)
    variables = random_variables(model, 32, 32, 3)

    def gradient(variables, images):
        def logits(variables, images):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

        return jax.grad(loss, 2)(logits, variables, images)

    images = jax.ShapeDtypeStruct(export.symbolic_shape("n, 32, 32, 3"), jnp.float32)
    checks = [export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    exported = export.export(jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=checks)(variables, images)
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    assert relative_error(exported.call(variables, images), jax.jit(gradient)(variables, images)) < 1e-3
