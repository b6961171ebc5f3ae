"""Batch norm folding: the same function in evaluation, and no training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import raises_user_error, relative_error
from tests.weights.test_layouts import variables_of
from vgg_jax import VGG, Network, load
from vgg_jax.config import Config, ModelConfig
from vgg_jax.training.initialization import source_variables
from vgg_jax.weights.folding import fold_batch_norm

pytestmark = pytest.mark.usefixtures("narrow")
HEAD = dict(num_classes=5, pool_size=1, hidden=(8,))


def network(dtype=jnp.float32, **fields):
    """Return a network and random variables with variances away from zero and kernels that keep the scale of maps."""
    model = VGG(**(dict(depth=11, batch_norm=True) | HEAD | fields), dtype=dtype, param_dtype=dtype)
    variables = variables_of(model)
    statistics = {
        name: {"mean": leaves["mean"], "var": jnp.abs(leaves["var"]) + 0.1}
        for name, leaves in variables.get("batch_stats", {}).items()
    }
    return model, {**variables, "batch_stats": statistics} if statistics else variables


@pytest.mark.parametrize(
    "fields",
    [{}, dict(depth=16), dict(depth=16, conv1x1=True), dict(lrn=True), dict(HEAD, conv_head=True, hidden=(8, 8))],
)
def test_folding_keeps_the_function(fields, x64):
    model, variables = network(jnp.float64, **fields)
    folded, params = fold_batch_norm(model, variables)
    images = np.random.default_rng(1).normal(size=(2, 33, 40, 3))
    assert (folded.batch_norm, folded.folded, list(params)) == (False, True, ["params"])
    assert not any(name.startswith("bn") for name in params["params"])
    assert relative_error(folded.apply(params, images), model.apply(variables, images)) < 1e-12


def test_folding_keeps_the_dtype_of_float32_and_widens_bfloat16():
    for dtype in (jnp.float32, jnp.bfloat16):
        folded, params = fold_batch_norm(*network(dtype))
        assert params["params"]["conv1_1"]["kernel"].dtype == folded.param_dtype == jnp.float32


def test_folding_leaves_a_plain_network_unchanged():
    model, variables = network(batch_norm=False)
    assert fold_batch_norm(model, variables) == (model, variables)


def test_folding_ends_a_network_at_the_convolution():
    model, variables = network(num_classes=None, hidden=(), final_layer="bn2_1")
    folded, params = fold_batch_norm(model, variables)
    images = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)
    assert folded.final_layer == "conv2_1"
    assert relative_error(folded.apply(params, images), model.apply(variables, images)) < 1e-5


def test_folded_network_refuses_training():
    folded, params = fold_batch_norm(*network())
    images, rngs = np.zeros((1, 32, 32, 3), np.float32), {"dropout": jax.random.key(0)}
    with pytest.raises(ValueError, match="contain their batch norm, which training needs; expected the network before"):
        folded.apply(params, images, train=True, rngs=rngs)
    folded.apply(params, images, train=True, frozen=("features",), rngs=rngs)
    with pytest.raises(ValueError, match="folded is True; expected batch_norm False"):
        VGG(11, batch_norm=True, folded=True)


def test_folded_file_initializes_frozen_convolutions_only(tmp_path):
    path = str(tmp_path / "folded.safetensors")
    Network(*fold_batch_norm(*network()), None).save(path)
    assert load(path).model.folded
    config = Config(ModelConfig(11, batch_norm=False), init_from=path)
    model = VGG(11, **HEAD)
    with raises_user_error("folded.safetensors, is folded into its convolutions", "expected a network before folding"):
        source_variables(config, model)
    config.freeze = ("features",)
    assert "conv1_1" in source_variables(config, model)["params"]
