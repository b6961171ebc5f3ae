"""Deterministic views of images: equal to torchvision's to the pixel."""

import numpy as np

from tests.conftest import photographs
from vgg_jax.data import image_files


def test_test_views_equal_torchvisions_to_the_pixel(torchvision):
    transforms = torchvision.transforms
    for resize, size in ((256, 224), (232, 224), (97, 65)):
        reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        for image in photographs(50):
            ours = image_files.center_crop(image_files.resize_short_side(image, resize), size)
            np.testing.assert_array_equal(ours, np.asarray(reference(image)))
