"""The reference VGG for JAX."""

from vgg_jax.model import VGG
from vgg_jax.perceptual import features
from vgg_jax.pretrained import load_pretrained, preprocessing
from vgg_jax.weight_files import load, save
from vgg_jax.weights import from_torch, to_torch

__all__ = ["VGG", "features", "from_torch", "load", "load_pretrained", "preprocessing", "save", "to_torch"]
