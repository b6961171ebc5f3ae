"""The initialization of the first convolution with the principal axes of image patches.

Each channel of conv1_1 then sees one axis. Batch norm gives all axes the same variance: it whitens the patches.

Source: K. Jordan, arXiv:2404.00498, section 3.2. There the layer has 2x2 kernels and does not train; here it has the
network's 3x3 kernels and trains, unless it is frozen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.data.augmentation import normalize
from vgg_jax.training.run import Run

IMAGES = 2048  # enough for a stable covariance of 27 values; at least one batch is read


def patch_axes(run: Run) -> np.ndarray:
    """Return the principal axes of the 3x3 patches of the first training images of a run.

    Returns:
      The axes as columns in the order of falling variance, (9 C, 9 C) float32; rows are in the order (3, 3, C).

    Raises:
      UserError: if an image cannot be read.
    """
    config, mean_product = run.config, functools.partial(_mean_product, run.config.data.mean, run.config.data.std)
    steps = range(min(-(-IMAGES // config.step_size), run.steps_per_epoch))
    batches = run.train_loader.train_batches(config.seed, config.step_size, steps, config.accumulation_steps)
    product = jax.jit(mean_product, out_shardings=NamedSharding(run.mesh, P()))
    products = [np.asarray(jax.device_get(product(batch["image"])), np.float64) for batch in batches]
    _, axes = np.linalg.eigh(np.mean(products, axis=0))
    return axes[:, ::-1].astype(np.float32)


def _mean_product(mean: tuple[float, ...], std: tuple[float, ...], images: jax.Array) -> jax.Array:
    """Return the mean of the outer product of each 3x3 patch with itself, (9 C, 9 C), of uint8 images (N, H, W, C)."""
    images = normalize(images, mean, std)
    _, height, width, _ = images.shape
    shifted = [images[:, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    patches = jnp.concatenate(shifted, axis=-1)
    return jnp.einsum("nhwp,nhwq->pq", patches, patches, precision="highest") / patches[..., 0].size
