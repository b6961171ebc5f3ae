"""The protocols of the paper, compared with a fully convolutional network in PyTorch."""

import itertools

import jax
import numpy as np
import pytest

from tests.conftest import photographs, random_variables, relative_error
from vgg_jax import VGG, to_torch
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation import protocols

# Networks with fewer pools, so that small images suffice.
SMALL = dict(depth=11, pool_after=(1, 2, 3), pool_size=7)
SMALL_PREPARE = Preprocessing(resize=64, crop=56)
SMALL_NETWORK = (VGG(**SMALL, hidden=(64, 32), num_classes=100), SMALL_PREPARE, (56, 64, 75))


def convolutional(torchvision, net):
    """Return torchvision's network with convolutions in place of its linear layers."""
    import torch

    layers = [net.features]
    size = 7
    for layer in net.classifier:
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.reshape(layer.out_features, -1, size, size)
            convolution = torch.nn.Conv2d(weight.shape[1], weight.shape[0], size)
            convolution.weight, convolution.bias = torch.nn.Parameter(weight), layer.bias
            layers.append(convolution)
            size = 1
        elif isinstance(layer, torch.nn.ReLU):
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers).eval()


def small_torch_network(torchvision):
    """Return column A with three pools, a 7x7 head of 64 and 32, and 100 classes."""
    import torch

    cfg = [64, "M", 128, "M", 256, 256, "M", 512, 512, 512, 512]
    net = torchvision.models.VGG(torchvision.models.vgg.make_layers(cfg), num_classes=100)
    widths = (512 * 49, 64, 32, 100)
    linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    net.classifier = torch.nn.Sequential(
        *(linear[0], torch.nn.ReLU(), torch.nn.Dropout(), linear[1], torch.nn.ReLU(), torch.nn.Dropout(), linear[2])
    )
    return net.eval()


@pytest.mark.parametrize(
    ("build", "model", "prepare", "scales", "count"),
    [
        (small_torch_network, *SMALL_NETWORK, 3),
        pytest.param(small_torch_network, *SMALL_NETWORK, 10, marks=pytest.mark.slow),
        pytest.param(
            lambda torchvision: torchvision.models.vgg16(weights=None).eval(),
            *(VGG(16), Preprocessing(), (256, 288, 320), 10),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["three_pools", "three_pools_ten_images", "vgg16"],
)
def test_dense_evaluation_matches_a_convolutional_network(torchvision, build, model, prepare, scales, count):
    """Compare photographs of odd sizes at three scales, each with its horizontal flip."""
    import torch

    net = build(torchvision)
    variables = random_variables(model, prepare.crop, prepare.crop, 3)
    variables["params"]["fc8"]["kernel"] *= 100  # so that the posteriors differ
    net.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(model, variables).items()})
    reference = convolutional(torchvision, net)
    scores, posteriors = (
        jax.jit(function, static_argnums=0) for function in (protocols.dense_scores, protocols.dense_posteriors)
    )
    for photo in photographs(count):
        for scale in scales:
            image = prepare.uncropped(photo, scale)[None]
            assert min(image.shape[1:3]) == scale
            with torch.no_grad():
                both = [
                    reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).mean((2, 3))
                    for x in (image, image[:, :, ::-1])
                ]
            assert relative_error(scores(model, variables, image), both[0].numpy()) < 1e-5
            expected = sum(torch.softmax(x, 1) for x in both) / 2
            # Scores of up to some 20 with a relative error of 1e-6 are posteriors with one of 2e-5.
            np.testing.assert_allclose(posteriors(model, variables, image), expected.numpy(), rtol=1e-4, atol=1e-7)


def test_dense_scores_at_the_input_size_are_the_logits():
    model = VGG(**SMALL, hidden=(16,), num_classes=10)
    variables = random_variables(model, 56, 56, 3)
    images = np.random.default_rng(0).normal(size=(2, 56, 56, 3)).astype(np.float32)
    scores = jax.jit(protocols.dense_scores, static_argnums=0)(model, variables, images)
    np.testing.assert_allclose(scores, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected H and W of at least 56"):
        protocols.dense_scores(model, variables, images[:, :48])


def test_crops_lie_on_a_grid_from_edge_to_edge():
    """Worked out by hand: 256x340 leaves 32 rows and 116 columns outside a crop of 224."""
    tops, lefts = (0, 8, 16, 24, 32), (0, 29, 58, 87, 116)
    assert protocols.crop_corners(256, 340, 224) == [(top, left) for top in tops for left in lefts]
    assert protocols.crop_corners(224, 227, 224) == [(0, left) for _ in range(5) for left in (0, 1, 2, 2, 3)]
    image = np.arange(20 * 30 * 3).reshape(20, 30, 3)
    crops = protocols.grid_crops(image, 12)
    assert crops.shape == (25, 12, 12, 3)
    for crop, (top, left) in zip(crops, protocols.crop_corners(20, 30, 12), strict=True):
        np.testing.assert_array_equal(crop, image[top : top + 12, left : left + 12])


def test_crop_posteriors_average_crops_and_their_flips():
    model = VGG(**SMALL, hidden=(16,), num_classes=10)
    variables = random_variables(model, 56, 56, 3)
    crops = np.random.default_rng(0).normal(size=(3, 56, 56, 3)).astype(np.float32)
    logits = jax.jit(model.apply)(variables, np.concatenate([crops, crops[:, :, ::-1]]))
    expected = np.mean([np.exp(row) / np.exp(row).sum() for row in np.asarray(logits, np.float64)], 0)
    np.testing.assert_allclose(
        jax.jit(protocols.crop_posteriors, static_argnums=0)(model, variables, crops), expected, rtol=1e-5
    )
