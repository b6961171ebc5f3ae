"""Random erasing: rectangles of torchvision's distribution, for each image its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from vgg_jax.data.augmentation import Augmentation, augment, erasing_boxes, random_erasing

AREAS, ASPECTS = (0.02, 0.33), (0.3, 3.3)
RARE = 1e-6  # the distributions are tested with fixed seeds; of other seeds one in a million fails


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 64)])
def test_areas_aspects_and_places_follow_torchvision(height, width, torchvision):
    torch.manual_seed(0)
    image, params = torch.zeros(3, height, width), torchvision.transforms.RandomErasing.get_params
    theirs = np.array([params(image, AREAS, ASPECTS, [0.0])[:4] for _ in range(4000)], float)
    first, sides = erasing_boxes(jax.random.key(0), 4000, height, width, AREAS, ASPECTS)
    ours = np.concatenate([first, sides], 1).astype(float)
    for values in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / np.maximum(box[:, 3], 1),
        lambda box: box[:, 0] / (height - box[:, 2] + 1),
        lambda box: box[:, 1] / (width - box[:, 3] + 1),
    ):
        assert ks_2samp(values(ours), values(theirs)).pvalue > RARE


def test_rectangles_that_never_fit_erase_nothing():
    """Large areas with extreme aspects: torchvision gives up after ten draws."""
    _, sides = erasing_boxes(jax.random.key(0), 50, 8, 8, (0.9, 1.0), (8.0, 9.0))
    assert not np.asarray(sides).any()


def test_each_image_is_erased_with_the_probability():
    images = jnp.ones((2000, 16, 16, 1))
    erased = np.asarray(random_erasing(jax.random.key(1), images, 0.25, AREAS, ASPECTS) == 0)
    counts = erased.sum((1, 2, 3))
    assert (counts > 0).mean() == pytest.approx(0.25, abs=0.04)
    assert len(np.unique(counts)) > 20
    some = erased[counts > 0][0, ..., 0]
    assert some.sum() == some.any(0).sum() * some.any(1).sum()  # a rectangle


def test_erasing_leaves_other_random_numbers_unchanged():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8))
    options = dict(mean=(0.5,) * 3, std=(0.2,) * 3, pad=2, flip=True)
    plain, erased = (
        augment(jax.random.key(0), {"image": images}, Augmentation(**options, **more))["image"]
        for more in ({}, {"erasing": 1.0})
    )
    assert (np.asarray(erased == plain) | np.asarray(erased == 0)).all()
    assert (np.asarray(erased == 0).any((1, 2, 3))).mean() > 0.9
