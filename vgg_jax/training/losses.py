"""The training losses, and the share of right answers that is reported beside them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


def mean_loss(
    logits: jax.Array,
    labels: jax.Array,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
) -> jax.Array:
    """Return the mean loss of a batch, a scalar.

    With class weights it is that of PyTorch's CrossEntropyLoss(weight=...): the weighted mean for labels that are
    classes, and the sum of the weighted losses divided by N for labels that are probabilities.

    Args:
      logits: as for `example_losses`, like the next three.
      labels: (N,) integers or (N, K) floats.
      loss: softmax, sigmoid or squared_error.
      label_smoothing: the part of each label that is spread.
      class_weights: for softmax, a weight for each of the K classes; (): all are equal.
    """
    if not class_weights:
        return example_losses(logits, labels, loss, label_smoothing).mean()
    weights = jnp.array(class_weights, logits.dtype)
    probabilities = jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    probabilities = optax.smooth_labels(probabilities.astype(logits.dtype), label_smoothing)
    losses: jax.Array = optax.softmax_cross_entropy(logits, weights * probabilities)
    return losses.sum() / (weights[labels].sum() if labels.ndim == 1 else len(labels))


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Return a weight for each class in inverse proportion to its examples: the sum over all examples is their number.

    Args:
      labels: (N,) integers below `num_classes`. A class without examples has the weight 0.
      num_classes: the number of weights.

    Source: `compute_class_weight("balanced", ...)` of scikit-learn.
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    return tuple(len(labels) / (present * count) if count else 0.0 for count in counts.tolist())


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


def class_sums(logits: jax.Array, labels: jax.Array, weight: jax.Array, loss: str = "softmax") -> dict[str, jax.Array]:
    """Return the right answers and the examples of each class: `class_correct` and `class_count`, (K,) each.

    With several labels and sigmoid, each output is a class of its own: all examples count, and an answer is right if
    the output is on the right side of 1/2.

    Args:
      logits: (N, K).
      labels: as for `example_losses`.
      weight: (N,), 1, or 0 for an example that does not count.
      loss: softmax or sigmoid.
    """
    if labels.ndim == 2 and loss == "sigmoid":
        right = (logits > 0) == (labels > 0.5)
        count = jnp.broadcast_to(weight[:, None], logits.shape)
        return {"class_correct": (right * count).sum(0), "class_count": count.sum(0)}
    classes = labels.argmax(-1) if labels.ndim == 2 else labels
    count = jax.nn.one_hot(classes, logits.shape[-1], dtype=weight.dtype) * weight[:, None]
    right = logits.argmax(-1) == classes
    return {"class_correct": (count * right[:, None]).sum(0), "class_count": count.sum(0)}


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
