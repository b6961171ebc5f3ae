"""Twenty steps of SGD with momentum equal PyTorch: parameters, momentum, running statistics and losses."""

import itertools

import jax
import numpy as np
import optax
import pytest
import torch

from tests.conftest import relative_error
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG, from_torch, to_torch
from vgg_jax.config import OptimizerConfig
from vgg_jax.model import TABLE_1
from vgg_jax.training.optimizer import MomentumState, make_optimizer
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step

STEPS = 20


def torch_network(torchvision, batch_norm, head, narrow):
    """Return VGG-11 of torchvision with a narrow head; its own holds 124 million of 133 million parameters.

    With `narrow`, its convolutions have the widths of `NARROW_TABLE`.
    """
    torch.manual_seed(0)
    nn, widths = torch.nn, (NARROW_TABLE if narrow else TABLE_1)["A"]
    net = (torchvision.models.vgg11_bn if batch_norm else torchvision.models.vgg11)(init_weights=False)
    plan = itertools.chain(*((*stage, "M") for stage in widths))
    net.features = torchvision.models.vgg.make_layers(list(plan), batch_norm)
    for module in net.features:  # torchvision itself would also draw the whole head
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    channels = widths[-1][-1]
    if head == "cifar":
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(channels, 10))
    else:
        net.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, 32), nn.ReLU(), nn.Dropout(0)),
            *(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0)),
            nn.Linear(16, 10),
        )
    return net.double().train()


CELLS = list(itertools.product(("plain", "batch_norm"), ("cifar", "7x7"), ("xla", "winograd")))
NARROW_CELLS = [("plain", "cifar", "xla"), ("batch_norm", "7x7", "winograd")]


@pytest.mark.parametrize(
    ("kind", "head", "convolution", "width"),
    [(*cell, "narrow") for cell in NARROW_CELLS]
    + [pytest.param(*cell, "full", marks=pytest.mark.slow) for cell in CELLS],
)
def test_twenty_steps_follow_pytorch(kind, head, convolution, width, torchvision, x64, request):
    if width == "narrow":
        request.getfixturevalue("narrow")
    if convolution == "winograd":
        request.getfixturevalue("winograd")
    batch_norm = kind == "batch_norm"
    net = torch_network(torchvision, batch_norm, head, width == "narrow")
    reference = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    fields = dict(pool_size=1, hidden=()) if head == "cifar" else dict(hidden=(32, 16))
    model = VGG(11, batch_norm, num_classes=10, dropout_rate=0.0, dtype="float64", param_dtype="float64", **fields)
    _, variables = from_torch(net.state_dict(), model)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.01))
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=variables.get("batch_stats", {}), tx=optimizer
    )
    step = jax.jit(train_step, donate_argnums=0)
    key = jax.random.key(0)

    random = np.random.default_rng(0)
    for _ in range(STEPS):
        images = random.normal(size=(8, 32, 32, 3))
        labels = random.integers(0, 10, 8)
        state, metrics = step(state, {"image": images, "label": labels}, key)

        reference.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), torch.from_numpy(labels)
        )
        loss.backward()
        reference.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-10)

    (momentum,) = (s.trace for s in jax.tree.leaves(state.opt_state, is_leaf=has_trace) if has_trace(s))
    ours = to_torch(model, {"params": state.params, "batch_stats": state.batch_stats})
    our_momentum = to_torch(model, {"params": momentum, "batch_stats": state.batch_stats})
    theirs = net.state_dict()
    before_batch_norm = {
        f"features.{i}.bias"
        for i, layer in enumerate(itertools.chain(*model.stages))
        if batch_norm and layer.kind == "conv"
    }
    for name, tensor in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name in before_batch_norm:
            # The true gradient of such a bias is zero: both sides hold rounding noise and the decayed start.
            np.testing.assert_allclose(ours[name], tensor.numpy(), rtol=0, atol=1e-12)
        else:
            assert relative_error(ours[name], tensor.numpy()) < 1e-10, name
    for name, parameter in net.named_parameters():
        buffer = reference.state[parameter]["momentum_buffer"].numpy()
        if name in before_batch_norm:
            np.testing.assert_allclose(our_momentum[name], buffer, rtol=0, atol=1e-12)
        else:
            assert relative_error(our_momentum[name], buffer) < 1e-10, name


def has_trace(node):
    return isinstance(node, MomentumState)
