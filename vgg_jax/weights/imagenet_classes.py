"""The 1000 classes of ImageNet (ILSVRC 2012), in the order of the labels that every published network uses."""

import functools
import importlib.resources

from vgg_jax.model import VGG

HIDDEN = (4096, 4096)  # the widths of fc6 and fc7 in torchvision's networks


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1000 classes, as torchvision has them."""
    return _lines("imagenet_classes.txt")


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the WordNet identifiers of ImageNet's 1000 classes, such as n01440764: TFDS and folders use them."""
    return _lines("imagenet_synsets.txt")


def _lines(name: str) -> tuple[str, ...]:
    text = importlib.resources.files("vgg_jax").joinpath(name).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def is_imagenets(model: VGG, channels: int) -> bool:
    """Return whether a network has the shape of torchvision's networks for ImageNet.

    Args:
      model: the network.
      channels: the number of channels of its images.
    """
    return (model.num_classes, model.pool_size, model.hidden, channels) == (1000, 7, HIDDEN, 3) and not (
        model.lrn or model.conv1x1
    )
