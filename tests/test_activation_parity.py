"""Every activation and gradient of torchvision's eight networks. All sizes and widths: pytest -m "slow or not slow"."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.conftest import relative_error
from tests.test_parity import NETWORKS, randomize_statistics, with_hidden
from vgg_jax import from_torch, to_torch
from vgg_jax.features import layer_activations

# Every run tests a network of each depth at 64x64 with hidden layers of width 256: with the full width of 4096, these
# are nine tenths of the arrays and of the time. The slow runs test all networks, also at 224x224 and with full width.
CELLS = [(name, 64, 256) for name in ("vgg11", "vgg13_bn", "vgg16_bn", "vgg19")]
SLOW_CELLS = [
    *((name, 64, 256) for name in ("vgg11_bn", "vgg13", "vgg16", "vgg19_bn")),
    *((name, 224, 256) for name in ("vgg11", "vgg11_bn", "vgg13_bn")),
    *((name, size, 4096) for size in (64, 224) for name in NETWORKS),
]


def activations(net, x):
    """Return the logits, and the output of every module by its index in torchvision."""
    outputs = {}
    for part in ("features", "classifier"):
        for index, module in enumerate(getattr(net, part)):
            if hasattr(module, "inplace"):
                module.inplace = False  # otherwise a ReLU overwrites the output of the convolution
            module.register_forward_hook(
                lambda module, inputs, output, key=(part, index): outputs.__setitem__(key, output)
            )
    return net(x), outputs


@pytest.mark.parametrize(
    ("name", "size", "width"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW_CELLS)]
)
def test_activations_and_gradients_equal_torchvision(name, size, width, torchvision, x64, request):
    if size == 224:
        request.getfixturevalue("winograd")
    torch.manual_seed(0)
    net = with_hidden(getattr(torchvision.models, name)(weights=None, init_weights=False), width)
    net = randomize_statistics(net).double().eval()
    model, variables = from_torch(net.state_dict())
    random = np.random.default_rng(0)
    x, weights = random.normal(size=(1, size, size, 3)), random.normal(size=1000)

    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    logits, expected = activations(net, tensor)
    (logits * torch.from_numpy(weights)).sum().backward()

    # torchvision names the same layers features.N and classifier.N, by their index.
    names = {("features", i): layer.name for i, layer in enumerate(itertools.chain(*model.stages))}
    names |= {("classifier", i): layer.name for i, layer in enumerate(model.head)}
    assert names.keys() == expected.keys()

    def loss(params, x):
        outputs = layer_activations(model, {**variables, "params": params}, x, layers=model.layer_names)
        return (outputs["fc8"] * weights).sum(), outputs

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, input_gradient), actual = gradient(variables["params"], x)
    for key, tensor_output in expected.items():
        output = tensor_output.detach().numpy()
        output = output.transpose(0, 2, 3, 1) if output.ndim == 4 else output
        assert relative_error(actual[names[key]], output) < 1e-11, names[key]

    assert relative_error(input_gradient, tensor.grad.numpy().transpose(0, 2, 3, 1)) < 1e-11
    # Gradients have the names and layouts of the weights.
    ours = to_torch(model, {"params": gradients, "batch_stats": variables.get("batch_stats", {})})
    for key, parameter in net.named_parameters():
        assert relative_error(ours[key], parameter.grad.numpy()) < 1e-11, key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("vgg11_bn", 256), *((name, 4096) for name in NETWORKS)])
def test_float32_activations_and_classes_agree(name, width, torchvision):
    """Compare as users run the network: activations up to 1e-4, and the predicted class of 256 images."""
    torch.manual_seed(0)
    net = with_hidden(getattr(torchvision.models, name)(weights=None, init_weights=False), width)
    net = randomize_statistics(net).eval()
    model, variables = from_torch(net.state_dict())
    x = np.random.default_rng(0).normal(size=(256, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        expected = torch.cat([net(part) for part in tensor.split(64)]).numpy()
        _, outputs = activations(net, tensor[:4])
    logits = np.concatenate([jax.jit(model.apply)(variables, part) for part in np.split(jnp.asarray(x), 4)])
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    relus = [layer.name for layer in itertools.chain(*model.stages) if layer.kind == "relu"]
    actual = jax.jit(functools.partial(layer_activations, model, layers=relus))(variables, x[:4])
    for i, layer in enumerate(itertools.chain(*model.stages)):
        if layer.kind == "relu":
            output = outputs["features", i].numpy().transpose(0, 2, 3, 1)
            assert relative_error(actual[layer.name], output) < 1e-4, layer.name
