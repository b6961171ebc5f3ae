"""Mean, covariance and principal axes of pixels."""

import numpy as np

from vgg_jax.data.augmentation import Augmentation
from vgg_jax.data.pixel_statistics import pixel_statistics, principal_axes


def test_pixel_statistics_equal_numpys():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (5 + i, 9, 3)).astype(np.uint8) for i in range(4)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    mean, covariance = pixel_statistics(images)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(pixels.T, bias=True), rtol=1e-9, atol=1e-15)


def test_published_color_constants_are_principal_axes():
    """Published with four digits: orthonormal to that, and of a covariance of pixels in [0, 1]."""
    options = Augmentation(mean=(0.0,) * 3, std=(1.0,) * 3)
    vectors = np.array(options.color_eigenvectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    covariance = vectors @ np.diag(options.color_eigenvalues) @ vectors.T
    values, ours = principal_axes(covariance)
    np.testing.assert_allclose(values, options.color_eigenvalues, atol=1e-4)
    np.testing.assert_allclose(np.abs(ours), np.abs(vectors), atol=0.01)  # the two smaller eigenvalues are close
    assert 0.2 < np.sqrt(np.diag(covariance)).mean() < 0.3  # near the published deviations, 0.229, 0.224, 0.225
