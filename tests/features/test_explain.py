"""Explanations against Captum's, on the same random networks in float64, and their use."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import raises_user_error, random_variables, relative_error
from tests.narrow import NARROW_TABLE
from tests.test_parity import randomize_statistics
from vgg_jax import VGG, from_torch
from vgg_jax.features import explain, layer_activations
from vgg_jax.model import PLAIN, TABLE_1

TOLERANCE = 1e-6  # rounding in float64 gives about 1e-14
LABELS = np.array([3, 1])
SIZE = (32, 35)  # 2x2 positions before the last pool, and an odd side


class TorchVGG(nn.Module):
    """torchvision's network of any width; its ReLUs overwrite nothing, as Captum needs."""

    def __init__(self, stages, batch_norm, hidden, classes):
        super().__init__()
        layers, channels = [], 3
        for stage in stages:
            for features in stage:
                layers.append(nn.Conv2d(channels, features, 3, padding=1))
                nn.init.kaiming_normal_(layers[-1].weight)
                layers += [*([nn.BatchNorm2d(features)] if batch_norm else []), nn.ReLU()]
                channels = features
            layers.append(nn.MaxPool2d(2))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes)),
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@functools.cache
def build(column, batch_norm, narrow):
    """Return a torch network with random weights and statistics in float64."""
    torch.manual_seed(0)
    width = (24, 5) if narrow else (4096, 1000)
    net = randomize_statistics(TorchVGG((NARROW_TABLE if narrow else TABLE_1)[column], batch_norm, *width))
    return net.double().eval()


CELLS = [("A", True, True), ("D", False, True), ("A", True, False), ("D", False, False)]
NAMES = ["VGG-11-BN narrow", "VGG-16 narrow", "VGG-11-BN", "VGG-16"]


@pytest.fixture(
    params=[pytest.param(c, id=n, marks=() if c[2] else pytest.mark.slow) for c, n in zip(CELLS, NAMES, strict=True)]
)
def networks(request, monkeypatch, x64):
    """Return a torch network, and the same network and variables in JAX."""
    if request.param[2]:
        monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
    net = build(*request.param)
    model, variables = from_torch(net.state_dict())
    return net, model.clone(layers=PLAIN), variables


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, *SIZE, 3))


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def captum(make, images, **options):
    """Return the attributions of a Captum class, without its warnings about hooks and gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nhwc(make().attribute(nchw(images), target=torch.from_numpy(LABELS[: len(images)]), **options))


def module_of(net, model, layer):
    """Return the torch module of a layer of the convolutional part."""
    return net.features[[x.name for stage in model.stages for x in stage].index(layer)]


def test_grad_cam_equals_captum(networks, images):
    from captum.attr import LayerGradCam

    net, model, variables = networks
    for layer in (None, "conv3_1"):
        module = module_of(net, model, layer or explain.last_map(model))
        signed = captum(lambda module=module: LayerGradCam(net, module), images)[..., 0]
        positive = captum(lambda module=module: LayerGradCam(net, module), images, relu_attributions=True)[..., 0]
        cam = jax.jit(functools.partial(explain.grad_cam, model, layer=layer), static_argnames="positive")
        assert relative_error(cam(variables, images, LABELS, positive=False), signed) < TOLERANCE
        np.testing.assert_allclose(cam(variables, images, LABELS), positive, atol=TOLERANCE * np.abs(signed).max())


def test_guided_backpropagation_equals_captum(networks, images):
    from captum.attr import GuidedBackprop

    net, model, variables = networks
    expected = captum(lambda: GuidedBackprop(net), images)
    found = jax.jit(functools.partial(explain.guided_backpropagation, model))(variables, images, LABELS)
    assert expected.any()
    assert relative_error(found, expected) < TOLERANCE


def test_integrated_gradients_equal_captum(networks, images):
    from captum.attr import IntegratedGradients

    (net, model, variables), images = networks, images[:1]
    baseline = np.random.default_rng(1).normal(size=images.shape)
    expected = captum(
        lambda: IntegratedGradients(net), images, baselines=nchw(baseline), n_steps=50, method="gausslegendre"
    )
    function = functools.partial(explain.integrated_gradients, model, steps=50, batch_size=20)
    found = jax.jit(function)(variables, images, LABELS[:1], baseline=baseline)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("window", "stride"), [((12, 10), (9, 10)), (20, 10)])
def test_occlusion_equals_captum(networks, images, window, stride):
    """The windows of both cases are cut at the right or lower edge."""
    from captum.attr import Occlusion

    net, model, variables = networks
    sides, steps = (x if isinstance(x, tuple) else (x, x) for x in (window, stride))
    options = dict(sliding_window_shapes=(3, *sides), strides=(3, *steps), baselines=0.5)
    expected = captum(lambda: Occlusion(net), images, **options)
    function = functools.partial(explain.occlusion, model, window=window, stride=stride, baseline=0.5, batch_size=10)
    found = jax.jit(function)(variables, images, LABELS)
    assert relative_error(found, expected[..., 0]) < TOLERANCE


@pytest.fixture(scope="module")
def network():
    """Return a narrow VGG-11 with five classes in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        model = VGG(11, num_classes=5, pool_size=1, hidden=(8, 8), layers=PLAIN)
        yield model, random_variables(model, 32, 32, 3)


@pytest.fixture(scope="module")
def pixels(images):
    return np.float32(images)


def test_integrated_gradients_sum_to_the_difference(network, pixels):
    """The sum is the logit of the image minus that of the baseline, up to the error of 30 points."""
    model, variables = network
    found = explain.integrated_gradients(model, variables, pixels[:1], 3, baseline=0.3, steps=30)
    logits = [model.apply(variables, x)[:, 3] for x in (pixels[:1], np.full_like(pixels[:1], 0.3))]
    np.testing.assert_allclose(found.sum((1, 2, 3)), logits[0] - logits[1], atol=0.01 * np.abs(found).sum())


def test_batch_size_leaves_explanations_unchanged(network, pixels):
    """Seven points in chunks of two, and nine windows in chunks of four, need padding."""
    model, variables = network
    gradients = functools.partial(explain.integrated_gradients, model, variables, pixels, LABELS, steps=7)
    falls = functools.partial(explain.occlusion, model, variables, pixels, LABELS, 16)
    for function, size in ((gradients, 4), (falls, 8)):
        reference = function(batch_size=1)
        np.testing.assert_allclose(function(batch_size=size), reference, atol=2e-5 * np.abs(reference).max())


def test_images_of_a_batch_are_explained_alone(network, pixels):
    model, variables = network
    together = explain.grad_cam(model, variables, pixels, LABELS, "relu3_2", positive=False)
    alone = [explain.grad_cam(model, variables, pixels[i : i + 1], int(LABELS[i]), "relu3_2", positive=False)[0]
             for i in (0, 1)]  # fmt: skip
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(together).max())


def test_channel_of_another_layer_is_explained(network, pixels):
    """One point of the integral, between two images that differ by 1: the gradient of the sum of a channel's map."""
    model, variables = network
    found = explain.integrated_gradients(model, variables, pixels, 5, steps=1, baseline=pixels - 1, output="conv2_1")

    def score(x):
        return layer_activations(model, variables, x, "conv2_1")["conv2_1"][..., 5].sum()

    np.testing.assert_allclose(found, jax.grad(score)(pixels - 0.5), atol=1e-5)


def test_rematerialized_network_gives_the_same_grad_cam(network, pixels):
    model, variables = network
    maps = [explain.grad_cam(model.clone(remat=remat), variables, pixels, 2, positive=False) for remat in (False, True)]
    np.testing.assert_allclose(*maps, atol=1e-6 * np.abs(maps[0]).max())


def test_bfloat16_network_gives_float32_explanations(network, pixels):
    model, variables = network
    rough = model.clone(dtype=jnp.bfloat16)
    for function in (
        functools.partial(explain.grad_cam, positive=False),
        explain.guided_backpropagation,
        explain.integrated_gradients,
        functools.partial(explain.occlusion, window=16),
    ):
        result = jax.eval_shape(functools.partial(function, rough), variables, pixels, LABELS)
        assert result.dtype == jnp.float32
    maps = [explain.grad_cam(net, variables, pixels, 2, positive=False) for net in (model, rough)]
    assert relative_error(maps[1], maps[0]) < 0.1


def test_wrong_arguments_are_refused(network, pixels):
    model, variables = network
    cases = [
        (explain.grad_cam, dict(labels=5), "found the label 5; expected 0 to 4, the channels of fc8"),
        (explain.grad_cam, dict(labels=-1), "found the label -1"),
        (explain.grad_cam, dict(labels=np.array([0, 1, 2])), "labels have shape (3,)"),
        (explain.grad_cam, dict(labels=0, layer="fc6"), "fc6 has no map"),
        (explain.grad_cam, dict(labels=0, layer="relu9_1"), "found no layer relu9_1"),
        (explain.grad_cam, dict(labels=0, layer="relu4_1", output="relu3_1"), "which follows relu3_1"),
        (explain.guided_backpropagation, dict(labels=0, output="fc9"), "found no layer fc9"),
        (explain.integrated_gradients, dict(labels=0, steps=0), "steps is 0; expected 1 or more"),
        (explain.occlusion, dict(labels=0, window=40), "the window has 40 pixels; expected 1 to 32"),
        (explain.occlusion, dict(labels=0, window=8, stride=9), "the stride is 9; expected 1 to 8"),
    ]
    for function, options, part in cases:
        with raises_user_error(part):
            function(model, variables, pixels, **options)
    with raises_user_error("the network has no classes"):
        explain.grad_cam(model.clone(num_classes=None), variables, pixels, 0)
