"""Mean, covariance and principal axes of the pixels of a data set."""

from collections.abc import Iterable

import numpy as np


def pixel_statistics(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of all pixels in [0, 1].

    Args:
      images: (H, W, C) uint8 each; H and W may differ.

    Returns:
      The mean (C,) and the covariance (C, C), float64.
    """
    count, total, products = 0, np.zeros(()), np.zeros(())
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]).astype(np.float64) / 255
        count += len(pixels)
        total = total + pixels.sum(0)
        products = products + pixels.T @ pixels
    mean = total / count
    return mean, products / count - np.outer(mean, mean)


def principal_axes(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal axes of a covariance.

    Args:
      covariance: (C, C) float64, symmetric.

    Returns:
      The eigenvalues (C,), the largest first, and the eigenvectors (C, C) as columns. Each column has the sign that
      makes its first entry negative or zero.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    return values, np.where(vectors[0] > 0, -vectors, vectors)
