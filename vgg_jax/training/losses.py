"""The training losses, and the share of right answers that is reported beside them."""

import jax
import jax.numpy as jnp
import optax


def example_losses(
    logits: jax.Array, labels: jax.Array, loss: str = "softmax", label_smoothing: float = 0.0
) -> jax.Array:
    """Return the loss of each example.

    The mean over the examples is that of PyTorch's CrossEntropyLoss, BCEWithLogitsLoss or MSELoss.

    Args:
      logits: (N, K).
      labels: (N,) integers below K, or (N, K) floats: probabilities of the classes for softmax, of each output for
        sigmoid, and the targets for squared_error.
      loss: softmax (cross entropy), sigmoid (mean binary cross entropy of the outputs) or squared_error (their mean
        squared error).
      label_smoothing: for softmax, the part of each label that is spread over all classes, as in PyTorch; for sigmoid,
        the part that is replaced by 1/2, as in Keras.

    Returns:
      (N,) losses.
    """
    if loss == "softmax":
        return _cross_entropy(logits, labels, label_smoothing)
    targets = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    targets = targets.astype(logits.dtype)
    if loss == "squared_error":
        return jnp.square(logits - targets).mean(-1)
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    losses: jax.Array = optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
    return losses


def share_right(logits: jax.Array, labels: jax.Array, loss: str = "softmax") -> jax.Array:
    """Return the share of right answers of each example: (N,) floats or booleans.

    Args:
      logits: (N, K).
      labels: as for `example_losses`. One class for each image counts as right if its output is the largest. With
        several labels and sigmoid, the share is that of the outputs on the right side of 1/2.
      loss: softmax or sigmoid.
    """
    if labels.ndim == 1:
        return logits.argmax(-1) == labels
    if loss == "softmax":
        return logits.argmax(-1) == labels.argmax(-1)
    return ((logits > 0) == (labels > 0.5)).mean(-1)


def _cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Return the cross entropy (N,) of logits (N, K) with labels (N,) or (N, K)."""
    if labels.ndim == 1 and not label_smoothing:
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses
    probabilities = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    if label_smoothing:
        probabilities = optax.smooth_labels(probabilities, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, probabilities)
    return losses
