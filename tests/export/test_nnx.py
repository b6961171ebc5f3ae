"""Networks as NNX modules: the same logits, gradients, steps and running statistics as the Linen network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import random_variables, relative_error
from tests.export.pages import run_page
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import IMAGENET, VGG, Network
from vgg_jax.export.nnx import from_nnx

LABELS = np.array([0, 1, 2, 3])


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="bn")])
def net(request, narrow):
    model = VGG(11, batch_norm=request.param, num_classes=5, hidden=(16,), pool_size=1)
    return Network(model, random_variables(model, 32, 32, 3), IMAGENET)


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def bridged_loss(module, images):
    return cross_entropy(module(images, train=True, mutable=["batch_stats"]))


def our_loss(net, params, images, key):
    """Return the loss of a training batch and the new running statistics."""
    variables = {**net.variables, "params": params}
    logits, updates = net.model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    return cross_entropy(logits), updates.get("batch_stats")


def test_bridged_logits_equal_ours(net, images):
    module = net.to_nnx()
    jitted = nnx.jit(lambda module, images: module(images))
    expected = jax.jit(net.model.apply)(net.variables, images)  # net(images) is optimized: other rounding
    assert relative_error(jitted(module, images), expected) < 1e-6
    assert_equal_trees(from_nnx(module), dict(net.variables))


def test_bridged_step_equals_ours(net, images):
    """Dropout draws the same masks: the first key of the stream is the one that we pass."""
    module, key = net.to_nnx(nnx.Rngs(dropout=3)), nnx.Rngs(dropout=3).fork().dropout()
    params = net.variables["params"]
    (expected_loss, statistics), gradients = jax.jit(
        jax.value_and_grad(lambda params: our_loss(net, params, images, key), has_aux=True)
    )(params)
    transformation = optax.sgd(0.1, momentum=0.9)
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    optimizer = nnx.Optimizer(module, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, found = nnx.value_and_grad(bridged_loss)(module, images)
        optimizer.update(module, found)
        return value, found

    value, found = step(module, optimizer)
    assert relative_error(value, expected_loss) < 1e-6
    assert relative_error(nnx.to_pure_dict(found), gradients) < 1e-6
    after = from_nnx(module)
    assert relative_error(after["params"], optax.apply_updates(params, updates)) < 1e-6
    if net.model.batch_norm:
        assert relative_error(after["batch_stats"], statistics) < 1e-6
        assert relative_error(after["batch_stats"], net.variables["batch_stats"]) > 1e-3


@pytest.mark.slow
def test_bridged_gradient_equals_ours(net, images):
    """In evaluation, where batch norm takes its running statistics."""
    found = nnx.jit(nnx.grad(lambda module: cross_entropy(module(images))))(net.to_nnx())
    expected = jax.jit(
        jax.grad(lambda params: cross_entropy(net.model.apply({**net.variables, "params": params}, images)))
    )
    assert relative_error(nnx.to_pure_dict(found), expected(net.variables["params"])) < 1e-6


def test_bridged_state_round_trips(net):
    module = net.to_nnx()
    graph, state = nnx.split(module)
    doubled = nnx.merge(graph, jax.tree.map(lambda leaf: 2 * leaf if leaf.dtype == jnp.float32 else leaf, state))
    assert_equal_trees(from_nnx(doubled), jax.tree.map(lambda leaf: 2 * leaf, dict(net.variables)))
    nnx.update(doubled, state)
    assert_equal_trees(from_nnx(doubled), dict(net.variables))


def test_nnx_page_runs(narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = VGG(11, batch_norm=True, num_classes=5, hidden=(16,), pool_size=1)
    Network(model, random_variables(model, 32, 32, 3), IMAGENET).save("vgg11.safetensors")
    found = run_page("nnx.md")
    assert found["logits"].shape == (1, 5)
    assert found["loss"] > 0
    assert (tmp_path / "trained.safetensors").exists()
