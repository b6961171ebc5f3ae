"""LPIPS against the package `lpips`, with the same random trunk and the authors' heads."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.errors import UserError
from vgg_jax.features import lpips, lpips_features
from vgg_jax.model import VGG
from vgg_jax.weights.layouts import from_torch

SIZES = ((32, 32), (33, 47))
ODD_SIZES = ((33, 47), (17, 35), (39, 21), (51, 37), (27, 65))


@pytest.fixture(scope="module")
def trunk():
    """Return a torch trunk of He-normal weights, and its state dict under torchvision's names."""
    import torch

    from benchmarks.pytorch import import_torchvision

    torchvision = import_torchvision()
    torch.manual_seed(0)
    net = torchvision.models.vgg16(weights=None).double()
    return net.features.eval()


@pytest.fixture(scope="module")
def reference(trunk):
    """Return the function of the package for a version: from NCHW tensors to distances."""
    import lpips as package

    @functools.cache
    def make(version, spatial=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package passes arguments that torchvision calls deprecated
            metric = package.LPIPS(net="vgg", version=version, pnet_rand=True, spatial=spatial, verbose=False).double()
        for part in (metric.net.slice1, metric.net.slice2, metric.net.slice3, metric.net.slice4, metric.net.slice5):
            for name, module in part.named_children():
                if hasattr(module, "weight"):
                    module.load_state_dict(trunk[int(name)].state_dict())
        return metric

    return make


@pytest.fixture(scope="module")
def network(trunk):
    state = {f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}
    with jax.enable_x64(True):
        return from_torch(state)


def images(size, low=-1.0, high=1.0, seed=0, batch=1):
    rng = np.random.default_rng(seed)
    first = rng.uniform(low, high, (batch, *size, 3))
    second = np.clip(first + rng.normal(0, 0.1 * (high - low), first.shape), low, high)
    return first, second


def photographs():
    """Return two photographs with values in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    return [np.float64(x) / 127.5 - 1 for x in load_sample_images().images]


def photograph_pairs(count):
    """Return pairs of crops, each of two different photographs: five odd sizes."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(count):
        height, width = ODD_SIZES[(i + i // 5) % 5]

        def crop(photograph, height=height, width=width):
            top = int(rng.integers(photograph.shape[0] - height + 1))
            left = int(rng.integers(photograph.shape[1] - width + 1))
            return photograph[None, top : top + height, left : left + width]

        pairs.append(tuple(map(crop, photographs())))
    return pairs


def changed_pairs(count):
    """Return pairs of a crop of a photograph and the same crop, changed in five ways: five odd sizes."""
    rng, pairs = np.random.default_rng(0), []
    for i in range(count):
        height, width = ODD_SIZES[(i + i // 5) % 5]
        photograph = photographs()[i % 2]
        top = int(rng.integers(8, photograph.shape[0] - height - 8))
        left = int(rng.integers(8, photograph.shape[1] - width - 8))

        def crop(down=0, across=0, top=top, left=left, height=height, width=width, photograph=photograph):
            return photograph[top + down : top + down + height, left + across : left + across + width]

        first = crop()
        second = (
            crop(*rng.integers(1, 8, 2)),  # shifted
            np.clip(first + rng.normal(0, 0.2, first.shape), -1, 1),  # noise
            np.mean([crop(y, x) for y in range(-4, 5) for x in range(-4, 5)], axis=0),  # blurred
            np.clip(0.7 * first + 0.2, -1, 1),  # brighter, with less contrast
            first[:, ::-1],  # flipped
        )[i % 5]
        pairs.append((first[None], second[None]))
    return pairs


def torch_tensor(array):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


SHORT_CELLS = {("0.1", False, False), ("0.1", True, False), ("0.0", True, True)}


@pytest.mark.parametrize(
    "version, spatial, normalize",
    [
        pytest.param(*cell, marks=() if cell in SHORT_CELLS else pytest.mark.slow)
        for cell in itertools.product(("0.1", "0.0"), (False, True), (False, True))
    ],
)
def test_distances_equal_those_of_the_package(network, reference, version, spatial, normalize):
    """Equal to 1e-10 in float64: the same sums in another order."""
    model, variables = network
    low = 0.0 if normalize else -1.0
    for i, size in enumerate(SIZES):
        first, second = images(size, low, seed=i)
        expected = reference(version, spatial)(torch_tensor(first), torch_tensor(second), normalize=normalize)
        with jax.enable_x64(True):
            found = lpips(model, variables, first, second, input_range=(low, 1), version=version, spatial=spatial)
        expected = expected.detach().numpy()[:, 0]
        np.testing.assert_allclose(found, expected if spatial else expected[:, 0, 0], rtol=1e-10, atol=1e-14)


def assert_distances_equal(network, single, reference, pairs, options, atol):
    """Compare with the package: 1e-10 relative in float64; in float32 1e-5, and `atol` for distances and for maps."""
    for first, second in pairs:
        for version, spatial, normalize in options:
            images = [(x + 1) / 2 for x in (first, second)] if normalize else (first, second)
            expected = (
                reference(version, spatial)(*map(torch_tensor, images), normalize=normalize).detach().numpy()[:, 0]
            )
            expected = expected if spatial else expected[:, 0, 0]
            arguments = dict(input_range=(0 if normalize else -1, 1), version=version, spatial=spatial)
            with jax.enable_x64(True):
                found = lpips(*network, *images, **arguments)
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
            rough = lpips(*single, *map(np.float32, images), **arguments)
            np.testing.assert_allclose(rough, expected, rtol=1e-5, atol=atol[spatial])


OPTIONS = list(itertools.product(("0.1", "0.0"), (False, True), (False, True)))


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_distances_of_photographs_equal_those_of_the_package(network, single, reference, count):
    """20 pairs in all eight forms of the call."""
    options = OPTIONS if count > 1 else OPTIONS[:1]
    assert_distances_equal(network, single, reference, photograph_pairs(count), options, atol=(0, 0))


@pytest.mark.slow
def test_distances_of_changed_photographs_equal_the_package(network, single, reference):
    """For almost equal images, of distance 2e-5, float32 is limited by the rounding of the activations themselves."""
    assert_distances_equal(network, single, reference, changed_pairs(20), OPTIONS, atol=(1e-9, 1e-8))


@pytest.mark.slow
def test_gradients_on_photographs_equal_those_of_the_package(network, reference):
    """Equal to 1e-8 in float64, relative to the largest, for both versions."""
    model, variables = network
    for i, (first, second) in enumerate(photograph_pairs(10) + changed_pairs(10)):
        version = ("0.1", "0.0")[i % 2]
        tensor = torch_tensor(first).requires_grad_()
        reference(version)(tensor, torch_tensor(second)).sum().backward()
        distance = functools.partial(lpips, model, variables, input_range=(-1, 1), version=version)
        with jax.enable_x64(True):
            gradient = jax.grad(lambda x, y: distance(x, y).sum())(jnp.asarray(first), second)  # noqa: B023 - called at once
        expected = np.moveaxis(tensor.grad.numpy(), 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.slow
def test_gradients_equal_those_of_the_package(network, reference):
    """Equal to 1e-8 in float64, relative to the largest."""
    model, variables = network
    first, second = images((33, 47), batch=2)
    tensor = torch_tensor(first).requires_grad_()
    reference("0.1")(tensor, torch_tensor(second)).sum().backward()
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: lpips(model, variables, x, second, input_range=(-1, 1)).sum())(jnp.asarray(first))
    expected = np.moveaxis(tensor.grad.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.fixture(scope="module")
def single(network):
    """Return the network in float32."""
    model, variables = network
    return model.clone(dtype=jnp.float32, param_dtype=jnp.float32), jax.tree.map(np.float32, variables)


def test_float32_distances_equal_those_of_the_package(single, reference):
    """Equal to 1e-5 relative: float32 sums of at most 4,608 products."""
    model, variables = single
    first, second = (np.float32(x) for x in images((48, 48), batch=3))
    expected = reference("0.1")(torch_tensor(first).double(), torch_tensor(second).double()).detach().numpy()
    found = jax.jit(functools.partial(lpips, model, input_range=(-1, 1)))(variables, first, second)
    np.testing.assert_allclose(found, expected[:, 0, 0, 0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["equal", "black", "dead channel"])
def test_gradients_are_finite(single, dtype, case):
    model, variables = single
    model = model.clone(dtype=jnp.dtype(dtype))
    first, second = (np.float32(x) for x in images((32, 32)))
    if case == "equal":
        second = first
    if case == "black":
        first = np.full_like(first, -1)
    if case == "dead channel":
        layers = {
            name: {"kernel": leaves["kernel"] * (name != "conv5_3"), "bias": leaves["bias"] * 0}
            for name, leaves in variables["params"].items()
        }
        variables = {"params": layers}
    value, gradient = jax.value_and_grad(lambda x: lpips(model, variables, x, second, input_range=(-1, 1)).sum())(first)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (value == 0) == (case == "equal")


@pytest.mark.slow
def test_bfloat16_keeps_values_and_order(single):
    """Within 2 %; the order of pairs that differ by more than 5 % is kept."""
    model, variables = single
    first, second = (np.float32(x) for x in images((48, 48), batch=6))
    second = first + (second - first) * np.linspace(0.3, 1.5, 6, dtype=np.float32)[:, None, None, None]
    exact, rough = (
        np.asarray(lpips(model.clone(dtype=dtype), variables, first, second, input_range=(-2, 2)))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    for i, j in itertools.combinations(range(6), 2):
        if abs(exact[i] - exact[j]) > 0.05 * max(exact[i], exact[j]):
            assert (exact[i] < exact[j]) == (rough[i] < rough[j])


@pytest.mark.slow
def test_bfloat16_keeps_values_and_order_of_photographs(single):
    """Within 2 %, and 1e-4 for almost equal images; the order of pairs that differ by more than 5 % is kept."""
    model, variables = single
    exact, rough = (
        np.array(
            [
                lpips(model.clone(dtype=dtype), variables, *map(np.float32, pair), input_range=(-1, 1))[0]
                for pair in photograph_pairs(20) + changed_pairs(20)
            ]
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(rough[:20], exact[:20], rtol=0.02)
    np.testing.assert_allclose(rough[20:], exact[20:], rtol=0.02, atol=1e-4)  # the rounding of unit vectors
    for i, j in itertools.combinations(range(40), 2):
        if abs(exact[i] - exact[j]) > 0.05 * max(exact[i], exact[j]):
            assert (exact[i] < exact[j]) == (rough[i] < rough[j])


@pytest.mark.slow
def test_targets_are_cached_and_shapes_are_free(single):
    """A cached target, a batch of two axes, no batch axis and vmap give the same numbers as pairs of images."""
    model, variables = single
    first, second = (np.float32(x) for x in images((32, 40), 0, 255, batch=4))
    distance = functools.partial(lpips, model, variables, input_range=(0, 255))
    expected = distance(first, second)
    target = lpips_features(model, variables, second, input_range=(0, 255))
    np.testing.assert_array_equal(distance(first, target), expected)
    shaped = distance(first.reshape(2, 2, 32, 40, 3), second.reshape(2, 2, 32, 40, 3))
    np.testing.assert_allclose(shaped, expected.reshape(2, 2), rtol=1e-6)  # another batch may change the last bits
    np.testing.assert_allclose(distance(first[0], second[0]), expected[0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(distance)(first, second), expected, rtol=1e-5)
    assert distance(first, second, spatial=True).shape == (4, 32, 40)


def bytes_for_backward_pass(function, images, *others):
    """Return the bytes of all maps that the gradient by the images keeps; computes nothing."""

    def pull_back(images, *others):
        return jax.vjp(lambda images: function(images, *others), images)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, images, *others))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape[:1] == images.shape[:1])


def test_rematerialization_halves_the_arrays_at_256x256():
    """Batch 8, with the activations of the second images computed in the same pass: 2069 and 554 MiB of maps."""
    model = VGG(16, num_classes=None, hidden=())
    images = jax.ShapeDtypeStruct((8, 256, 256, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(x, variables, y, remat):
        return lpips(model, variables, x, y, input_range=(-1, 1), remat=remat).sum()

    without, with_remat = (
        bytes_for_backward_pass(functools.partial(loss, remat=remat), images, variables, images)
        for remat in (False, True)
    )
    assert 0 < with_remat <= without / 2


@pytest.mark.slow  # the full network
def test_rematerialization_leaves_the_gradient_unchanged(single):
    model, variables = single
    first, second = (np.float32(x) for x in images((64, 64), batch=2))
    target = lpips_features(model, variables, second, input_range=(-1, 1))

    def loss(x, remat):
        return lpips(model, variables, x, target, input_range=(-1, 1), remat=remat).sum()

    sizes = [bytes_for_backward_pass(functools.partial(loss, remat=remat), first) for remat in (False, True)]
    assert sizes[1] <= sizes[0] / 2
    gradients = [jax.grad(functools.partial(loss, remat=remat))(first) for remat in (False, True)]
    np.testing.assert_allclose(*gradients, atol=1e-6 * np.abs(gradients[0]).max(), rtol=0)


def test_mistakes_are_refused(single):
    model, variables = single
    first, second = (np.float32(x) for x in images((32, 32), 0, 255))
    distance = functools.partial(lpips, model, variables, first, second)
    with pytest.raises(TypeError, match="input_range"):
        distance()
    with pytest.raises(UserError, match=r"values from .* expected input_range, -1 to 1"):
        distance(input_range=(-1, 1), check_range=True)
    with pytest.raises(UserError, match=r"version is '0\.2'; expected 0\.1 or 0\.0"):
        distance(input_range=(0, 255), version="0.2")
    with pytest.raises(UserError, match="relu1_2 of the others"):
        lpips(model, variables, first, second[:, :16], input_range=(0, 255))
    with pytest.raises(UserError, match="expected floats"):
        lpips(model, variables, first.astype(np.uint8), second, input_range=(0, 255))
    for other in (VGG(19), VGG(16, batch_norm=True), VGG(16, conv1x1=True)):
        with pytest.raises(UserError, match="LPIPS is defined on VGG-16 without batch norm"):
            lpips(other, variables, first, second, input_range=(0, 255))


def test_check_of_the_range_is_refused_inside_jit(single):
    model, variables = single
    first, second = (np.float32(x) for x in images((32, 32)))
    distance = jax.jit(functools.partial(lpips, model, input_range=(-1, 1), check_range=True))
    with pytest.raises(UserError, match="which have no values inside jit"):
        distance(variables, first, second)
