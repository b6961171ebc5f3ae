"""The precision of all products, in the text that is compiled for each platform."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from vgg_jax import VGG
from vgg_jax.config import Config, ModelConfig
from vgg_jax.errors import UserError
from vgg_jax.evaluation.protocols import dense_scores
from vgg_jax.model import FAST, PLAIN
from vgg_jax.ops.conv3x3 import conv3x3
from vgg_jax.ops.dense import dense_product
from vgg_jax.training.validation import check_config, create_model

FIELDS = dict(depth=16, conv1x1=True, batch_norm=True, num_classes=5, hidden=(16, 8), pool_size=1)
PRODUCT = re.compile(r"stablehlo\.(?:convolution|dot_general)\b.*")


def precisions(traced, platform):
    """Return how many convolutions and matrix products have each pair of precisions, in the text for a platform."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return collections.Counter(tuple(re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", line)) for line in PRODUCT.findall(text))


def trace_gradient(model, second_order=False):
    """Trace the gradient of the training loss, or its derivative in a direction, for images of 32x32."""
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        rngs = {"dropout": jax.random.key(0)}
        return (model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0] ** 2).sum()

    gradient = jax.grad(loss)

    def derivative(params, *others):
        if second_order:
            return jax.jvp(lambda p: gradient(p, *others), (params,), (params,))
        return gradient(params, *others)

    return jax.jit(derivative).trace(variables["params"], variables["batch_stats"], images)


def check_all(traced, name, count=3 * 16 - 1):
    """Check that there is no product but those of 16 layers and their two gradients, less that of the images."""
    for platform in ("cuda", "tpu"):
        assert precisions(traced, platform) == {(name, name): count}


@pytest.mark.parametrize("layers", [FAST, PLAIN], ids=["fast", "plain"])
@pytest.mark.parametrize("precision", [None, "high"], ids=str)
def test_every_product_of_training_has_the_precision(precision, layers, narrow, winograd):
    model = VGG(**FIELDS, precision=precision, layers=layers)
    check_all(trace_gradient(model), {None: "HIGHEST", "high": "HIGH"}[precision])


def test_second_derivatives_have_the_precision(narrow, winograd):
    # The derivative of a product is two products, but the images do not change.
    check_all(trace_gradient(VGG(**FIELDS), second_order=True), "HIGHEST", 3 * 47 - 2)


def test_bfloat16_ignores_the_precision(narrow, winograd):
    check_all(trace_gradient(VGG(**FIELDS, precision="highest", dtype=jnp.bfloat16)), "DEFAULT")


def trace_logits(model, apply=None):
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.jit(functools.partial(apply, model) if apply else model.apply).trace(variables, images)


@pytest.mark.parametrize(
    ("precision", "name"), [(None, "HIGH"), ("default", "DEFAULT"), ("highest", "HIGHEST")], ids=str
)
def test_field_wins_over_the_setting_of_jax(precision, name, narrow, winograd):
    """The setting counts when the network is traced, not when it is lowered."""
    with jax.default_matmul_precision("tensorfloat32"):
        traced = trace_logits(VGG(**FIELDS, precision=precision))
    assert set(precisions(traced, "cuda")) == {(name, name)}


@pytest.mark.parametrize("apply", [None, dense_scores], ids=["timm's head", "dense evaluation"])
def test_other_heads_have_the_precision(apply, narrow, winograd):
    model = VGG(**FIELDS, conv_head=apply is None)
    found = precisions(trace_logits(model, apply), "cuda")
    assert found == {("HIGHEST", "HIGHEST"): 16}


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [(conv3x3, [(2, 8, 8, 3), (3, 3, 3, 4), (4,)]), (dense_product, [(2, 3), (3, 4)])],
    ids=["conv3x3", "dense_product"],
)
def test_operations_follow_jax_by_default(operation, shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for setting, name in ((None, "DEFAULT"), ("high", "HIGH")):
        with jax.default_matmul_precision(setting):
            traced = jax.jit(operation).trace(*arguments)
        assert set(precisions(traced, "tpu")) == {(name, name)}


def test_model_refuses_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'tf32'; expected one of default, high, highest, or None"):
        VGG(11, precision="tf32")


def test_config_refuses_unknown_precision():
    with pytest.raises(UserError) as caught:
        check_config(Config(model=ModelConfig(precision="tf32")))
    assert str(caught.value) == "config.model.precision is 'tf32'; expected one of default, high, highest"


def test_config_passes_the_precision_on():
    assert create_model(ModelConfig(num_classes=5)).precision == "highest"
    assert create_model(ModelConfig(num_classes=5, precision="default")).precision == "default"
