"""Logits against PyTorch's: torchvision's eight networks, and the paper's other columns, built here."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import relative_error
from vgg_jax import from_torch

NETWORKS = [f"vgg{depth}{suffix}" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")]
SIZES = [(1, 224, 224), (2, 32, 32), (2, 65, 97)]  # the batches: images, height, width
# Every run tests all networks with hidden layers of width 256, each size in one dtype, and one with the full width of
# 4096 at all sizes in both: these layers are nine tenths of the weights. The slow runs test all networks like that one.
FULL_WIDTH = [pytest.param(n, 4096, marks=() if n == "vgg16_bn" else pytest.mark.slow) for n in NETWORKS]
# Rounding gives about 5e-15 in float64. In float32, sums of up to 25,088 products in another order give 3e-6.
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


def with_hidden(net, width):
    """Return the network with hidden layers of this width."""
    if width != 4096:
        net.classifier[0] = nn.Linear(25088, width)
        net.classifier[3] = nn.Linear(width, width)
        net.classifier[6] = nn.Linear(width, 1000)
    return net


def randomize_statistics(net):
    """Draw random running statistics, scales and biases: zeros and ones of a new network would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return net


def compare(net, dtype, sizes=SIZES):
    """Compare the logits at every size and return our model."""
    net = net.to(torch.float64 if dtype == np.float64 else torch.float32).eval()
    model, variables = from_torch(net.state_dict())
    apply = jax.jit(model.apply)
    for size in sizes:
        x = np.random.default_rng(0).normal(size=(*size, 3)).astype(dtype)
        with torch.no_grad():
            expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        logits = apply(variables, x)
        assert logits.dtype == dtype
        assert logits.shape == expected.shape
        assert expected.std() > 0
        error = relative_error(logits, expected)
        print(f"{size}: relative error {error:.1e}")  # pytest -rP shows it
        assert error <= TOLERANCE[dtype], size
    return model


def check_logits(name, width, torchvision, sizes):
    """Compare the logits of a network in both dtypes, each at its sizes."""
    torch.manual_seed(0)
    # The initial weights of PyTorch's layers: those of torchvision take twice as long to draw.
    net = with_hidden(getattr(torchvision.models, name)(weights=None, init_weights=False), width)
    net = randomize_statistics(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= 6**0.5  # to He's variance, or the logits of a deep network are its last biases
    for dtype in (np.float32, np.float64):
        model = compare(net, dtype, sizes[dtype])
        assert f"vgg{model.depth}{'_bn' * model.batch_norm}" == name


@pytest.mark.parametrize(("name", "width"), [*((name, 256) for name in NETWORKS), *FULL_WIDTH])
def test_logits_equal_torchvision(name, width, torchvision, x64):
    parts = {np.float32: SIZES[:1], np.float64: SIZES[1:]}
    check_logits(name, width, torchvision, parts if width == 256 else dict.fromkeys(TOLERANCE, SIZES))


@pytest.mark.parametrize(
    ("name", "width"), [("vgg11", 256), *(pytest.param(name, 4096, marks=pytest.mark.slow) for name in NETWORKS)]
)
def test_logits_by_winograd_equal_torchvision(name, width, torchvision, x64, winograd):
    check_logits(name, width, torchvision, dict.fromkeys(TOLERANCE, SIZES[2:]))


def sequential(lrn, conv1x1):
    """Return column A-LRN or C in PyTorch with narrow hidden layers, from a copy of Table 1 of its own."""
    layers, channels = [], 3
    column_a = [[64], [128], [256, 256], [512, 512], [512, 512]]
    column_c = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
    for stage, widths in enumerate(column_a if lrn else column_c):
        for i, width in enumerate(widths):
            size = 1 if conv1x1 and i == 2 else 3
            layers += [nn.Conv2d(channels, width, size, padding=size // 2), nn.ReLU()]
            if lrn and stage == 0:
                layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2))
            channels = width
        layers.append(nn.MaxPool2d(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                *(nn.Linear(25088, 256), nn.ReLU(), nn.Dropout()),
                *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 1000)),
            )

        def forward(self, x):
            return self.classifier(self.avgpool(self.features(x)).flatten(1))

    return Net()


@pytest.mark.parametrize("column", ["lrn", "conv1x1"])
def test_columns_missing_in_torchvision_equal_pytorch(column, x64):
    torch.manual_seed(0)
    net = sequential(lrn=column == "lrn", conv1x1=column == "conv1x1")
    for dtype in (np.float32, np.float64):
        model = compare(net, dtype)
    assert (model.depth, model.lrn, model.conv1x1) == ((11, True, False) if column == "lrn" else (16, False, True))


def test_variables_share_no_memory_with_torch(torchvision):
    """PyTorch updates its weights in place, which must not change our variables."""
    torch.manual_seed(0)
    net = torchvision.models.vgg11_bn(weights=None)
    _, variables = from_torch(net.state_dict())
    before = jax.tree.map(np.array, variables)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, before))


def test_cifar_head_equals_torch():
    """Networks for CIFAR have a global average and one linear layer: `pool_size=1, hidden=()`."""
    torch.manual_seed(0)
    features = sequential(lrn=False, conv1x1=True).features

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.classifier = features, nn.Sequential(nn.Linear(512, 10))

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    model = compare(Net(), np.float32, [(2, 64, 64)])
    assert (model.num_classes, model.hidden, model.pool_size) == (10, (), 1)
