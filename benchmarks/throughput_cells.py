"""The cells of benchmarks/throughput.py, their work, and the weights and images of all arms."""

import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

# SGD. With these weights the loss falls fast even at this rate; with a larger one it falls until rounding decides it.
RATE, MOMENTUM, WEIGHT_DECAY = 0.0001, 0.9, 5e-4
# Mean and standard deviation of the pixels in [0, 1].
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison: a network, an image size and a mode."""

    name: str  # as `parse_cell` reads it
    depth: int
    batch_norm: bool
    size: int  # image height and width in pixels
    mode: str  # infer; train; or epoch: training on augmented images that are resident on the device
    dtype: str  # dtype of the computation: float32 or bfloat16
    cifar_head: bool
    batch: int
    examples: int  # number of examples of an epoch

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of `vgg_jax.VGG`."""
        head: dict[str, Any] = dict(num_classes=10, pool_size=1, hidden=()) if self.cifar_head else {}
        return dict(depth=self.depth, batch_norm=self.batch_norm, dropout_rate=0.0, dtype=self.dtype, **head)


def parse_cell(name: str, batch: int, size: int = 0, examples: int = 50_000) -> Cell:
    """Return a cell by its name, as vgg16_bn-32-train; cells at 32 have the head for CIFAR, at 224 for ImageNet."""
    match = re.fullmatch(r"vgg(11|13|16|19)(_bn)?-(32|224)-(infer|train|epoch)(-bf16)?", name)
    if not match or (match[4] == "epoch" and match[3] != "32"):
        raise ValueError(f"found no cell {name}; expected one such as vgg16_bn-32-train or vgg16-224-infer-bf16")
    dtype = "bfloat16" if match[5] else "float32"
    small = match[3] == "32"
    return Cell(name, int(match[1]), bool(match[2]), size or int(match[3]), match[4], dtype, small, batch, examples)


def noise_pixels(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Return the uint8 images and the labels of an epoch."""
    shape = (cell.examples, cell.size, cell.size, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8), np.arange(cell.examples) % 10


def flops(cell: Cell) -> int:
    """Return the operations for one image, two for each multiply-add.

    Training has three times as many as inference, without the gradient of the images, which no arm computes.
    """
    from vgg_jax import VGG
    from vgg_jax.training.speed import multiply_adds, training_flops

    model = VGG(**cell.fields)
    if cell.mode == "infer":
        return 2 * sum(multiply_adds(model, cell.size).values())
    return training_flops(model, cell.size)


def write_inputs(cell: Cell, directory: str) -> None:
    """Write weights with torchvision's names, and a batch of normal noise."""
    from vgg_jax import VGG
    from vgg_jax.weights.layouts import table

    random = np.random.default_rng(0)
    weights = {}
    for name, (_, _, leaf), _, shape, _ in table(VGG(**cell.fields)):
        array = random.standard_normal(shape, np.float32)
        array *= math.sqrt(2 / math.prod(shape[1:])) if leaf == "kernel" else 0.05
        weights[name] = array + np.float32(leaf in ("scale", "var"))
    np.savez(os.path.join(directory, "weights.npz"), **weights)  # type: ignore[arg-type] # a name could be that of another argument
    images = random.standard_normal((cell.batch, cell.size, cell.size, 3), np.float32)
    labels = random.integers(0, 10, cell.batch).astype(np.int32)
    np.savez(os.path.join(directory, "inputs.npz"), images=images, labels=labels)
