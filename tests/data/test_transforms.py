"""Views of images on the host: decoded to Pillow's pixels, drawn from the stated distributions."""

import io
import sys

import numpy as np
import PIL.Image
import pytest
from scipy.stats import ks_2samp, kstest

from tests.conftest import photographs, raises_user_error
from tests.data.archives import encoded
from vgg_jax import config
from vgg_jax.data import image_files, transforms

RARE = 1e-6  # the distributions are tested with fixed seeds; of other seeds one in a million fails


def test_views_are_those_of_the_configuration():
    data, views = config.DataConfig(), transforms.Views()
    assert config.TRAIN_VIEWS == transforms.TRAIN_VIEWS
    assert vars(views).items() <= vars(data).items()
    with raises_user_error("train_view is 'none'; expected one of pad_crop, random_resized_crop, scale_crop"):
        transforms.Views(train_view="none")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_gives_pillows_pixels(mode):
    photo = photographs(1)[0]
    files = {
        "JPEG": encoded(photo, quality=95),
        "subsampled": encoded(photo, quality=70),
        "progressive": encoded(photo, progressive=True),
        "gray": encoded(photo.convert("L")),
        "CMYK": encoded(photo.convert("CMYK")),
        "PNG": encoded(photo, "PNG"),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "gray and alpha": encoded(photo.convert("LA"), "PNG"),
        "16 bit": encoded(PIL.Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        "a byte too many": encoded(photo, quality=95) + b"x",
    }
    for name, data in files.items():
        expected = np.asarray(image_files.decode(PIL.Image.open(io.BytesIO(data)), mode))
        decoded = image_files.decode_file(data, mode)
        assert decoded.shape == (*photo.size[::-1], len(mode)), name
        np.testing.assert_array_equal(decoded, expected.reshape(decoded.shape), err_msg=name)


@pytest.mark.parametrize(
    ("package", "function"),
    [
        ("simplejpeg", lambda: image_files.decode_file(b"", "RGB")),
        ("cykooz_resizer", lambda: transforms.random_resized_crop(np.zeros((9, 9, 3), np.uint8), 4, 0, 0)),
    ],
    ids=["simplejpeg", "cykooz_resizer"],
)
def test_missing_package_is_named_with_its_extra(package, function, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with raises_user_error(f"{package} is not installed: pip install 'vgg_jax[train]'"):
        function()


def test_resized_parts_equal_pillows_within_one_level():
    """The part is a crop alone, or what a crop shows of a whole image that is resized."""
    for i, photo in enumerate(photographs(10)):
        pixels = np.asarray(photo)
        width, height = photo.width // 2 + i, photo.height // 3 + 7 * i
        crop = pixels[i : i + height, 5 : 5 + width]
        ours = transforms._resize_part(crop, (0.0, 0.0, float(width), float(height)), 64)
        expected = photo.crop((5, i, 5 + width, i + height)).resize((64, 64), image_files.BILINEAR)
        np.testing.assert_allclose(ours.astype(int), np.asarray(expected), atol=1)

        side = 70 + 20 * i
        random = transforms._generator(0, i)
        random.integers(side, side + 1)
        whole = image_files.resize_short_side(photo, side)
        left, top = int(random.integers(whole.width - 64 + 1)), int(random.integers(whole.height - 64 + 1))
        ours = transforms.scale_crop(pixels, 64, side, side, 0, i)
        expected = np.asarray(whole.crop((left, top, left + 64, top + 64)))
        np.testing.assert_allclose(ours.astype(int), expected, atol=1)


def coordinates(height, width):
    """Return an image whose colors are its coordinates."""
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([rows, columns, 0 * rows], -1).round().astype(np.uint8)


def extent(crop, axis, length):
    """Return the first and the last coordinate, in pixels of the whole, that the middle of a crop shows; the slope."""
    profile = crop[4:-4, 4:-4, axis].astype(float).mean(1 - axis) / 255 * (length - 1)
    slope, start = np.polyfit(np.arange(4, 4 + len(profile)) + 0.5, profile + 0.5, 1)
    return start, start + slope * len(crop), slope


def assert_uniform(values, low, high):
    assert kstest((np.array(values) - low) / (high - low), "uniform").pvalue > RARE


def test_scale_crop_draws_scale_and_place_uniformly():
    height, width, size = 240, 320, 64
    image = coordinates(height, width)
    scales, lefts, tops = [], [], []
    for position in range(1000):
        crop = transforms.scale_crop(image, size, 80, 160, 0, position)
        top, _, slope = extent(crop, 0, height)
        left, _, _ = extent(crop, 1, width)
        scales.append(height / slope)
        tops.append(top / (height - slope * size))
        lefts.append(left / (width - slope * size))
    assert 79 < min(scales) < 82  # the fit is good to about half a pixel
    assert 158 < max(scales) < 161
    assert_uniform(scales, 79.5, 160.5)
    assert_uniform(lefts, 0, 1)
    assert_uniform(tops, 0, 1)
    fixed = [height / extent(transforms.scale_crop(image, size, 100, 100, 0, i), 0, height)[2] for i in range(20)]
    np.testing.assert_allclose(fixed, 100, atol=1)
    first, again, other_seed, other_place = (
        transforms.scale_crop(image, size, 80, 160, *k) for k in ((0, 7), (0, 7), (1, 7), (0, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other_seed).any()
    assert (first != other_place).any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (333, 500), (257, 331), (224, 224)])
def test_crops_at_the_edges_stay_within_the_image(height, width, monkeypatch):
    """The crop is at the last row and column of every scale, where rounding might pass the edge."""
    image = np.zeros((height, width, 1), np.uint8)

    class AtTheEnd:
        def __init__(self, scale):
            self.scale = scale

        def integers(self, low, high=None):
            return self.scale if high is not None else low - 1

    for scale in range(224, 513):
        monkeypatch.setattr(transforms, "_generator", lambda seed, position: AtTheEnd(position))
        assert transforms.scale_crop(image, 224, 224, 512, 0, scale).shape == (224, 224, 1)


def test_random_resized_crop_follows_torchvisions_distribution(torchvision):
    """Areas, aspects and places beside torchvision's own, by the two-sample test of Kolmogorov and Smirnov."""
    import torch

    height, width = 300, 400
    image = coordinates(height, width)
    areas, aspects, lefts = [], [], []
    for position in range(1000):
        crop = transforms.random_resized_crop(image, 48, 0, position)
        (left, right, _), (top, bottom, _) = extent(crop, 1, width), extent(crop, 0, height)
        areas.append((right - left) * (bottom - top) / (height * width))
        aspects.append(np.log((right - left) / (bottom - top)))
        lefts.append(left / width)
    torch.manual_seed(0)
    of_torch = [
        torchvision.transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.08, 1.0), (3 / 4, 4 / 3))
        for _ in range(1000)
    ]
    for ours, theirs in (
        (areas, [h * w / (height * width) for _, _, h, w in of_torch]),
        (aspects, [np.log(w / h) for _, _, h, w in of_torch]),
        (lefts, [left / width for _, left, _, _ in of_torch]),
    ):
        assert ks_2samp(ours, theirs).pvalue > RARE
    assert min(areas) < 0.1
    assert max(areas) > 0.95
    np.testing.assert_array_equal(*(transforms.random_resized_crop(image, 32, 0, 7) for _ in range(2)))
