"""Train a small U-Net on the named stages of VGG: find handwritten digits on photographs.

    python examples/segmentation.py [--weights FILE] [--steps 300]

The data are made here: scikit-learn's 8x8 digits, enlarged and pasted in a random color on crops of its two
photographs. The labels of the pixels are background and digit. Training crops are from the left three quarters of the
photographs, test crops from the rest; the test has other digits, too. Prints the mean intersection over union (IoU) of
background and digit on 64 test images. Without weights, the backbone is random and is trained, as all else.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vgg_jax import IMAGENET, VGG, load
from vgg_jax.features import layer_activations

STAGES = ("relu1_1", "relu2_1", "relu3_2")
CLASSES = ("background", "digit")


class Decoder(nn.Module):
    """A U-Net's decoder: from the maps of VGG's stages to the logits of the classes at every pixel."""

    @nn.compact
    def __call__(self, maps: list[jax.Array]) -> jax.Array:
        """Return logits (N, H, W, classes) of maps (N, H', W', C'), the largest first."""
        x = nn.relu(nn.Conv(32, (1, 1))(maps[-1]))
        for skip in maps[-2::-1]:
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = jnp.concatenate([x, nn.Conv(16, (1, 1))(skip)], -1)
            x = nn.relu(nn.Conv(32, (3, 3))(x))
        return nn.Conv(len(CLASSES), (1, 1))(x)


def make_images(random, digits, photographs, count, side):
    """Return images (N, side, side, 3) in [0, 1] and the labels of their pixels (N, side, side).

    Args:
      random: NumPy's generator.
      digits: (M, 8, 8) in [0, 1].
      photographs: (H, W, 3) uint8 arrays.
      count: N.
      side: side of the images in pixels, at least 32.
    """
    images, labels = np.zeros((count, side, side, 3), np.float32), np.zeros((count, side, side), np.int32)
    for image, label in zip(images, labels, strict=True):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(length - side + 1) for length in photograph.shape[:2])
        image[:] = photograph[top : top + side, left : left + side] / 255
        digit = np.kron(digits[random.integers(len(digits))], np.ones((3, 3)))  # 24x24
        top, left = random.integers(side - 24 + 1, size=2)
        window = np.s_[top : top + 24, left : left + 24]
        image[window] += digit[..., None] * (random.uniform(0, 1, 3) - image[window])
        label[window] = digit > 0.5
    return images, labels


def mean_iou(predicted, labels):
    """Return the mean over the classes of the intersection over union of all pixels."""
    pairs = [(predicted == label, labels == label) for label in range(len(CLASSES))]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def train(backbone, variables, steps, batch_size=8, side=48, test_images=64):
    """Return the mean IoU on the test images before and after training.

    Args:
      backbone: a VGG.
      variables: its variables, which are trained with a tenth of the decoder's learning rate.
      steps: the number of steps of Adam.
      batch_size: images of a step.
      side: side of the images in pixels.
      test_images: number of test images.
    """
    from sklearn.datasets import load_digits, load_sample_images

    digits, photographs, random = load_digits().images / 16, load_sample_images().images, np.random.default_rng(0)
    training = digits[:1400], [p[:, : p.shape[1] * 3 // 4] for p in photographs]
    images, labels = make_images(random, digits[1400:], [p[:, p.shape[1] * 3 // 4 :] for p in photographs],
                                 test_images, side)  # fmt: skip
    decoder = Decoder()

    def logits(params, x):
        normalized = (x - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)
        maps = layer_activations(backbone, {**variables, "params": params["backbone"]}, normalized, STAGES)
        return decoder.apply(params["decoder"], [maps[name] for name in STAGES])

    geometry = backbone.layer_geometry
    maps = [(side // geometry[name].stride, geometry[name].channels) for name in STAGES]
    zeros = [jnp.zeros((1, length, length, channels)) for length, channels in maps]
    params = {"backbone": variables["params"], "decoder": jax.jit(decoder.init)(jax.random.key(0), zeros)}
    rates = {"backbone": optax.adam(3e-4), "decoder": optax.adam(3e-3)}
    optimizer = optax.multi_transform(rates, {"backbone": "backbone", "decoder": "decoder"})
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, x, labels):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    predict = jax.jit(lambda params, x: logits(params, x).argmax(-1))
    before = mean_iou(np.asarray(predict(params, images)), labels)
    for i in range(steps):
        params, opt_state, value = step(params, opt_state, *make_images(random, *training, batch_size, side))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i + 1}/{steps}  loss {float(value):.4f}")
    return before, mean_iou(np.asarray(predict(params, images)), labels)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a name or a file of a VGG (default: random weights of VGG-11)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.weights:
        net = load(options.weights, features_only=True)
        backbone, variables = net.model, net.variables
    else:
        backbone = VGG(11, num_classes=None, hidden=(), final_layer=STAGES[-1])
        variables = jax.jit(backbone.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    start = time.perf_counter()
    before, after = train(backbone, variables, options.steps)
    seconds = time.perf_counter() - start
    print(f"mean IoU {after:.3f} (untrained: {before:.3f}; {seconds:.0f} s)")


if __name__ == "__main__":
    main()
