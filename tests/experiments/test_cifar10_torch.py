"""The PyTorch trainer that vgg_jax is compared with trains the same network in the same way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

from experiments import cifar10_torch
from vgg_jax import VGG, from_torch
from vgg_jax.config import Config, DataConfig, OptimizerConfig
from vgg_jax.data.augmentation import normalize
from vgg_jax.data.image_folder import FolderRecords
from vgg_jax.training.rate import make_rate


@functools.cache
def network():
    torch.manual_seed(0)
    return cifar10_torch.Network(11).eval()


def test_pytorchs_network_is_ours():
    model, variables = from_torch(network().state_dict())
    assert (model.column, model.batch_norm, model.pool_size, model.hidden) == ("A", True, 1, ())
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, rtol=1e-4, atol=1e-6)


def test_pytorchs_initialization_has_our_distribution():
    _, theirs = from_torch(network().state_dict())
    model = VGG(depth=11, batch_norm=True, num_classes=10, pool_size=1, hidden=())
    ours = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, theirs["params"]) == jax.tree.map(jnp.shape, ours["params"])
    for layer, parameters in ours["params"].items():
        for name, parameter in parameters.items():
            n, expected = parameter.size, float(jnp.std(parameter))
            found = float(jnp.std(theirs["params"][layer][name]))
            # A percent, or five standard errors of the ratio of two standard deviations for fewer parameters.
            assert found == pytest.approx(expected, rel=max(0.01, 5 / np.sqrt(n))), (layer, name)
            assert float(jnp.mean(theirs["params"][layer][name])) == pytest.approx(
                float(jnp.mean(parameter)), abs=5 * 1.5 * expected / np.sqrt(n) + 1e-6
            ), (layer, name)


def test_pytorchs_rate_follows_our_schedule():
    recipe = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_epochs=1)
    ours = make_rate(Config(optimizer=recipe, batch_size=32, num_epochs=5), 1000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: cifar10_torch.rate_at(update, 31, 155))
    for update in range(155):
        assert schedule.get_last_lr()[0] == pytest.approx(ours(update), abs=1e-8)
        optimizer.step()
        schedule.step()


def test_pytorch_decays_kernels_only():
    optimizer = cifar10_torch.make_optimizer(network(), 0.1, 5e-4)
    decayed, others = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    assert (decayed, others) == (sum(p.numel() for p in network().parameters()) - 8266, 8266)


def test_pytorchs_normalized_pixels_are_ours():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = cifar10_torch.normalize(torch.from_numpy(pixels))
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = normalize(pixels, DataConfig().mean, DataConfig().std)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-6)


def test_pytorchs_crops_are_reflected_then_flipped():
    random = np.random.default_rng(0)
    pixels, corners = random.integers(0, 256, (20, 32, 32, 3), np.uint8), random.integers(0, 9, (20, 2))
    flips = random.random(20) < 0.5
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = np.stack([image[y : y + 32, x : x + 32] for image, (y, x) in zip(padded, corners, strict=True)])
    expected = np.where(flips[:, None, None, None], expected[:, :, ::-1], expected)
    found = cifar10_torch.crop(*map(torch.from_numpy, (pixels, corners, flips)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("split", ["train", "train[:7]", "train[7:]", "train[3:9]"])
def test_pytorch_reads_the_files_of_our_split(split, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(6):
            PIL.Image.new("RGB", (32, 32)).save(tmp_path / "train" / name / f"{number:04}.jpg")
    records = FolderRecords(str(tmp_path), split, "train")
    expected = [(records.locate(i), label) for i, label in enumerate(records.labels)]
    assert cifar10_torch.files_of(str(tmp_path), split) == expected
