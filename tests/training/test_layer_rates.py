"""Learning rates by layer group equal PyTorch's parameter groups."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from tests.conftest import raises_user_error, relative_error
from tests.training.test_trajectory import torch_network
from vgg_jax import VGG, from_torch, to_torch
from vgg_jax.config import Config, OptimizerConfig
from vgg_jax.training.optimizer import layer_rates, make_optimizer
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step
from vgg_jax.training.validation import check_config

FACTORS = "features=0.1,stage5=0.5,conv5_2=0.25,fc7=2"


def test_narrowest_name_counts():
    rates = layer_rates(FACTORS, VGG(11, True, num_classes=10))
    assert rates["conv1_1"] == rates["bn4_2"] == 0.1
    assert rates["conv5_1"] == rates["bn5_2"] == 0.5
    assert (rates["conv5_2"], rates["fc7"]) == (0.25, 2.0)
    assert "fc8" not in rates
    assert layer_rates("fc7=2,conv5_2=0.25,stage5=0.5,features=0.1", VGG(11, True, num_classes=10)) == rates


def torch_groups(net, model, rate):
    """Return parameter groups written by hand: torchvision's modules with convolutions of stage 5 at 16 and 18."""
    factor = {"features.16": 0.5, "features.18": 0.25, "classifier.3": 2.0}
    return [
        {"params": [p], "lr": rate * factor.get(name.rpartition(".")[0], 0.1 if name.startswith("features") else 1.0)}
        for name, p in net.named_parameters()
    ]


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_trajectory_equals_pytorch_parameter_groups(optimizer, torchvision, x64, narrow):
    """Twenty steps with weight decay and clipping, in float64."""
    net = torch_network(torchvision, False, "7x7", True)
    groups = torch_groups(net, None, 0.01)
    reference = (
        torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
        if optimizer == "sgd"
        else torch.optim.Adam(groups, lr=0.01, weight_decay=5e-4)
    )
    fields = dict(num_classes=10, hidden=(32, 16), dropout_rate=0.0, dtype="float64", param_dtype="float64")
    model = VGG(11, **fields)
    _, variables = from_torch(net.state_dict(), model)
    config = OptimizerConfig(name=optimizer, clip_norm=1e3)
    tx = make_optimizer(config, optax.constant_schedule(0.01), rates=layer_rates(FACTORS, model))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], batch_stats={}, tx=tx)
    step, random = jax.jit(train_step, donate_argnums=0), np.random.default_rng(0)
    for _ in range(20):
        images, labels = random.normal(size=(8, 32, 32, 3)), random.integers(0, 10, 8)
        state, _ = step(state, {"image": images, "label": labels}, jax.random.key(0))
        reference.zero_grad()
        logits = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        reference.step()
    ours = to_torch(model, {"params": state.params})
    for name, tensor in net.state_dict().items():
        assert relative_error(ours[name], tensor.numpy()) < 1e-10, name


def test_rates_scale_each_update_of_accumulated_gradients(x64):
    """Two micro-batches: the update is the factor times that of an optimizer without factors."""
    config = OptimizerConfig(momentum=0.0, weight_decay=0.0)
    params = {"conv1_1": {"kernel": np.ones(3)}, "fc8": {"kernel": np.ones(2)}}
    optimizer = make_optimizer(config, optax.constant_schedule(0.5), 2, {"conv1_1": 0.1})
    state = optimizer.init(params)
    for expected in (0.0, 1.0):
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["conv1_1"]["kernel"], -0.05 * expected)
        np.testing.assert_allclose(updates["fc8"]["kernel"], -0.5 * expected)


@pytest.mark.parametrize(
    ("rates", "line"),
    [
        ("stage1=0", "expected factors of more than 0; to freeze these layers, set config.freeze=('stage1',)"),
        ("head=-1", "config.optimizer.rates is 'head=-1'; expected factors of more than 0"),
        ("head", "config.optimizer.rates is 'head'; expected NAME=FACTOR, each name once, such as features=0.1"),
        ("head=1,head=2", "expected NAME=FACTOR, each name once"),
        ("stage6=1", "config.optimizer.rates: found no layer stage6 with parameters; expected some of features, head"),
        ("conv1_1=0.1", "config.optimizer.rates has conv1_1, which is frozen; remove it here or in config.freeze"),
    ],
)
def test_wrong_rates_are_refused(rates, line):
    config = Config(freeze=("stage1",))
    config.optimizer = dataclasses.replace(config.optimizer, rates=rates)
    with raises_user_error(line):
        check_config(config)
