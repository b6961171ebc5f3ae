"""Augmentation on the devices: the stated distributions, as pure functions of the key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from vgg_jax.data.augmentation import (
    Augmentation,
    augment,
    color_shift,
    cutout,
    normalize,
    random_crop,
    random_horizontal_flip,
)

RARE = 1e-6  # the distributions are tested with fixed seeds; of other seeds one in a million fails


def random_images(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize(("pad_mode", "of_numpy"), [("zeros", "constant"), ("reflect", "reflect")])
def test_random_crop_shifts_by_every_offset_and_pads(pad_mode, of_numpy):
    image = np.arange(1, 37, dtype=np.uint8).reshape(6, 6, 1)
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(np.stack([image] * 2000)), 2, pad_mode))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=of_numpy)
    expected = {padded[i : i + 6, j : j + 6].tobytes(): (i, j) for i in range(5) for j in range(5)}
    counts = np.zeros((5, 5))
    for crop in crops:
        counts[expected[crop.tobytes()]] += 1
    # 25 equally likely offsets: 80 each; chi-square with 24 degrees of freedom exceeds 60 once in 16,000.
    assert ((counts - 80) ** 2 / 80).sum() < 60


@pytest.mark.parametrize("side", [3, 4, 11])
def test_cutout_hides_a_square_around_any_pixel(side):
    """The square of the larger side exceeds the image; each side of 6x5 pixels leaves 30 different images."""
    height, width = (6, 5) if side < 11 else (12, 11)
    image = np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width, 1)
    expected = {}
    for y in range(height):
        for x in range(width):
            hidden = image.copy()
            hidden[max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side] = 0
            expected[hidden.tobytes()] = len(expected)
    draws = 80 * height * width
    images = np.asarray(cutout(jax.random.key(0), jnp.asarray(np.stack([image] * draws)), side))
    counts = np.zeros(height * width)
    for found in images:
        counts[expected[found.tobytes()]] += 1
    assert len(expected) == height * width
    # Equally likely centers: 80 each. A chi-square statistic exceeds its mean by 6 standard deviations once in 1e6.
    freedom = height * width - 1
    assert ((counts - 80) ** 2 / 80).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_cutout_has_the_mean_color_after_the_color_shift():
    options = Augmentation(mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4), color_shift=0.1)
    batch = {"image": random_images(6, 8, 8, 3) // 2 + 100}  # no pixel has the mean color
    images, hidden = (
        np.asarray(augment(jax.random.key(0), batch, dataclasses.replace(options, cutout=side))["image"])
        for side in (0, 4)
    )
    squares = (hidden == 0).all(-1)
    assert 4 <= squares.sum((1, 2)).min() <= squares.sum((1, 2)).max() <= 16
    np.testing.assert_array_equal(hidden[~squares], images[~squares])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_pad_and_hide_without_gathers(platform):
    """The random crop has its own form on each platform, which may be one gather."""

    def gathers(**fields):
        options = Augmentation(mean=(0.5,) * 3, std=(0.2,) * 3, pad=4, flip=True, **fields)
        step = jax.jit(functools.partial(augment, options=options))
        batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.uint8)}
        text = step.trace(jax.random.key(0), batch).lower(lowering_platforms=(platform,)).as_text()
        return [text.count(name) for name in ("stablehlo.gather", "stablehlo.scatter", "dynamic_slice")]

    assert gathers(pad_mode="reflect", cutout=8) == gathers()


def test_random_horizontal_flip_flips_half():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    images = np.asarray(random_horizontal_flip(jax.random.key(1), jnp.asarray(np.stack([image] * 2000))))
    flipped = (images == image[:, ::-1]).all((1, 2, 3))
    assert ((images == image).all((1, 2, 3)) ^ flipped).all()
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)  # five standard errors


def test_normalization_equals_torchvisions(torchvision):
    import torch

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    expected = torchvision.transforms.Normalize(mean, std)(tensor).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(normalize(jnp.asarray(images), mean, std), expected, atol=1e-6)  # float32 rounding


def test_color_shift_is_normal_along_the_principal_axes():
    options = Augmentation(mean=(0.0,) * 3, std=(1.0,) * 3)
    values, vectors = np.array(options.color_eigenvalues), np.array(options.color_eigenvectors)
    n = 20_000
    shifts = np.asarray(color_shift(jax.random.key(0), n, 0.1, options.color_eigenvalues, options.color_eigenvectors))
    assert shifts.shape == (n, 1, 1, 3)
    alphas = shifts[:, 0, 0] @ np.linalg.inv(vectors.T) / values  # the factor of each axis
    for alpha in alphas.T:
        assert kstest(alpha / 0.1, "norm").pvalue > RARE
    assert np.abs(np.corrcoef(alphas.T) - np.eye(3)).max() < 5 / np.sqrt(n)  # five standard errors


def test_color_shift_is_one_color_for_each_image():
    """The shift is in units of pixels in [0, 1], before the normalization."""
    images = random_images(4, 8, 8, 3)
    mean, std = (0.1, 0.2, 0.3), (0.2, 0.3, 0.4)
    batch = augment(jax.random.key(0), {"image": images}, Augmentation(mean=mean, std=std, color_shift=0.1))
    shift = (batch["image"] - normalize(images, mean, std)) * jnp.array(std)
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)  # float32 rounding
    assert len(np.unique(np.asarray(shift[:, 0, 0]).round(5), axis=0)) == 4


def test_augment_is_a_pure_function_of_its_key():
    images, labels = random_images(8, 8, 8, 3), jnp.arange(8)

    def view(seed, **fields):
        options = Augmentation(mean=(0.0,) * 3, std=(1 / 255,) * 3, **fields)
        batch = augment(jax.random.key(seed), {"image": images, "label": labels}, options)
        assert batch.keys() == {"image", "label"}
        assert batch["image"].dtype == jnp.float32
        np.testing.assert_array_equal(batch["label"], labels)
        return batch["image"]

    everything = dict(pad=2, pad_mode="reflect", cutout=3, flip=True, color_shift=0.1)
    np.testing.assert_array_equal(view(0, **everything), view(0, **everything))
    assert (view(0, **everything) != view(1, **everything)).any()
    np.testing.assert_allclose(view(0), images, rtol=1e-6)  # divided by 255, and by its inverse
