"""Train an autoencoder with LPIPS on crops of photographs.

    python examples/autoencoder.py --trunk vgg16 [--photographs FOLDER] [--steps 200]

`--trunk` is the network of the loss: a name or a file of VGG-16 (only the convolutional part is loaded), or `random`.
Without a folder, the photographs are the two of scikit-learn. The loss is LPIPS plus the mean absolute difference.
"""

import argparse
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vgg_jax import IMAGENET, VGG, load
from vgg_jax.data.image_files import read_image
from vgg_jax.data.listing import find_images
from vgg_jax.features import lpips


class Autoencoder(nn.Module):
    """A map from images (N, H, W, 3) in [0, 1] to 32 channels at an eighth of the size, and back."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the reconstruction of images, with the same shape."""
        for features in (32, 64, 32):
            x = nn.silu(nn.Conv(features, (4, 4), (2, 2))(x))
        for features in (64, 32, 32):
            x = nn.silu(nn.ConvTranspose(features, (4, 4), (2, 2))(x))
        return nn.sigmoid(nn.Conv(3, (3, 3))(x))


def train(trunk, variables, photographs: Sequence[np.ndarray], steps: int, crop: int = 32, batch_size: int = 8):
    """Return the loss of every step.

    Args:
      trunk: VGG-16 without batch norm.
      variables: its variables.
      photographs: (H, W, 3) uint8, each at least `crop` a side.
      steps: the number of steps of Adam.
      crop: side of the crops in pixels, a multiple of 8.
      batch_size: crops of a step.
    """
    random, model, optimizer = np.random.default_rng(0), Autoencoder(), optax.adam(2e-3)
    params = model.init(jax.random.key(0), jnp.zeros((1, crop, crop, 3)))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, variables, images):
        def loss(params):
            output = model.apply(params, images)
            distance = lpips(trunk, variables, output, images, input_range=(0, 1))
            return distance.mean() + jnp.abs(output - images).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    losses = []
    for i in range(steps):
        batch = []
        for _ in range(batch_size):
            photograph = photographs[random.integers(len(photographs))]
            top, left = (random.integers(side - crop + 1) for side in photograph.shape[:2])
            batch.append(photograph[top : top + crop, left : left + crop])
        params, opt_state, value = step(params, opt_state, variables, np.float32(batch) / 255)
        losses.append(float(value))
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i + 1}/{steps}  loss {losses[-1]:.4f}")
    return np.array(losses)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", required=True, help="a name or a file of VGG-16, or random")
    parser.add_argument("--photographs", metavar="FOLDER", help="default: the two photographs of scikit-learn")
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.trunk == "random":
        trunk = VGG(16, num_classes=None, hidden=())
        variables = trunk.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    else:
        net = load(options.trunk, features_only=True)
        trunk, variables = net.model, net.variables
    if options.photographs:
        photographs = [read_image(path, IMAGENET.view) for path, _ in find_images(options.photographs)]
    else:
        from sklearn.datasets import load_sample_images

        photographs = load_sample_images().images
    train(trunk, variables, photographs, options.steps)


if __name__ == "__main__":
    main()
