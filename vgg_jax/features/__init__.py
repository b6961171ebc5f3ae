"""Uses of a trained VGG: named activations, Gram matrices, perceptual distances, explanations and style transfer."""

from vgg_jax.features import explain
from vgg_jax.features.activations import layer_activations
from vgg_jax.features.dists import dists
from vgg_jax.features.gram import gram_matrix
from vgg_jax.features.lpips import lpips, lpips_features
from vgg_jax.features.perceptual import perceptual_distance
from vgg_jax.features.style_transfer import style_transfer

__all__ = [
    "dists",
    "explain",
    "gram_matrix",
    "layer_activations",
    "lpips",
    "lpips_features",
    "perceptual_distance",
    "style_transfer",
]
