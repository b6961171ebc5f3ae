"""Deterministic views of images: equal to torchvision's to the pixel."""

import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs
from vgg_jax.data import image_files


def test_test_views_equal_torchvisions_to_the_pixel(torchvision):
    transforms = torchvision.transforms
    for resize, size in ((256, 224), (232, 224), (97, 65)):
        reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        for image in photographs(50):
            ours = image_files.center_crop(image_files.resize_short_side(image, resize), size)
            np.testing.assert_array_equal(ours, np.asarray(reference(image)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("short_side", "size"), [(256, 224), (32, 32), (97, 65), (40, 1)])
def test_center_view_equals_pillows_to_the_pixel(channels, short_side, size):
    """Photographs that shrink, grow, keep their size, and have long sides."""
    random = np.random.default_rng(0)
    for height, width in [(375, 500), (500, 375), (97, 130), (256, 256), (20, 31), (1, 7), (9, 200), (300, 16)]:
        pixels = random.integers(0, 256, (height, width, channels), np.uint8)
        image = PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        expected = image_files.center_crop(image_files.resize_short_side(image, short_side), size)
        np.testing.assert_array_equal(image_files.center_view(pixels, short_side, size), expected)
