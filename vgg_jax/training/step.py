"""The training step and the evaluation step: pure functions of a state and a batch."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vgg_jax.training.finite import all_finite, is_finite
from vgg_jax.training.losses import class_sums, example_losses, mean_loss, share_right
from vgg_jax.training.state import TrainState

Batch = Mapping[str, Any]  # arrays, and `resident`, the arrays that a batch of `Loader.train_inputs` is gathered from


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    augment: Callable[[jax.Array, Any], Batch] = lambda key, batch: batch,
    label_smoothing: float = 0.0,
    loss: str = "softmax",
    class_weights: Sequence[float] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step of the optimizer on one batch.

    Pure: jit it with `augment` bound and the state donated.

    Args:
      state: the state before the step.
      batch: `image` (N, H, W, C), normalized floats unless `augment` normalizes them, and `label`: (N,) integers below
        the number of classes, or (N, K) floats for the K outputs; see `losses.example_losses`.
      key: the key of the run. Augmentation and dropout use keys folded from it and the step of the state.
      augment: from (key, batch) to a batch of normalized float images and of labels, which reach the loss. An entry
        `answer` replaces the labels in the accuracy.
      label_smoothing: the smoothing of the labels, as `losses.example_losses` takes it.
      loss: softmax, sigmoid or squared_error.
      class_weights: the weight of each class, as `losses.mean_loss` takes them.

    Returns:
      The state after the step, and the metrics of the batch before it: the mean `loss` (with the smoothed labels) and,
      except for squared_error, `accuracy`, both scalars, and `finite`, one boolean for each of `checked_tensors`. If
      one of them is not finite, only the step counter advances, so that the next step draws other random numbers.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    augmented = augment(augment_key, batch)
    images, labels = jnp.asarray(augmented["image"]), jnp.asarray(augmented["label"])
    answers = augmented.get("answer", labels)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updates = state.apply_fn(
            state.variables_with(params),
            images,
            train=True,
            frozen=tuple(state.frozen_params),
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        value = mean_loss(logits, labels, loss, label_smoothing, class_weights)
        return value, (logits, updates.get("batch_stats", {}))

    batch_loss, pull_back, (logits, batch_stats) = jax.vjp(loss_fn, state.params, has_aux=True)
    gradients = _head_last(lambda cotangent: pull_back(cotangent)[0], batch_loss, state.head_layers)
    metrics = {"loss": batch_loss}
    if loss != "squared_error":
        metrics["accuracy"] = share_right(logits, answers, loss).mean()
    checked = _in_order(images, batch_stats, batch_loss, gradients)
    finite = all_finite(list(checked.values()))
    state = state.apply_gradients(grads=gradients, finite=finite.all(), batch_stats=batch_stats)
    return state, {**metrics, "finite": finite}


def _head_last(
    pull_back: Callable[[jax.Array], dict[str, Any]], loss: jax.Array, head_layers: tuple[str, ...]
) -> dict[str, Any]:
    """Return the gradients of the loss; on one CPU device, compute those of the dense layers after all the others.

    The dense layers hold nine tenths of a VGG's gradients, but depend on few activations. Computed last, they never lie
    beside the activations of the convolutions: a step of VGG-16 at 224x224 needs 0.4 GiB less. The gradient that
    reaches these layers is computed a second time, at a hundredth of the cost of the step.
    """
    gradients = pull_back(jnp.ones_like(loss))
    if jax.device_count() > 1:
        return gradients  # several devices would exchange the recomputed gradients a second time
    others = {layer: gradient for layer, gradient in gradients.items() if layer not in head_layers}

    def one_after_the_others() -> jax.Array:
        # XLA removes an expression that is always 1. If a gradient is not finite, the step is undone anyway.
        finite = functools.reduce(jnp.logical_and, map(is_finite, jax.tree.leaves(others)), jnp.array(True))
        return jnp.where(finite, 1.0, 2.0).astype(loss.dtype)

    one = jax.lax.platform_dependent(cpu=one_after_the_others, default=lambda: jnp.ones_like(loss))
    return pull_back(one) | others


def checked_tensors(state: TrainState) -> list[str]:
    """Return the names of the tensors that must be finite in a step (gradients/conv1_1/kernel), in computed order."""
    return list(_in_order(None, state.batch_stats, None, state.params))


def _in_order(images: Any, batch_stats: Any, loss: Any, gradients: Any) -> dict[str, Any]:
    """Return the tensors by name: statistics in forward order (bn1_1 first), gradients in backward (fc8 first)."""

    def layers(kind: str, tree: Any) -> list[tuple[str, Any]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        # By number, and batch norm after its convolution: conv1_1, bn1_1, conv1_2, ..., fc8.
        leaves.sort(key=lambda leaf: (re.sub(r"\D", "", leaf[0][0].key), leaf[0][0].key in batch_stats))
        return [(f"{kind}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves]

    return {
        "images": images,
        **dict(layers("batch_stats", batch_stats)),
        "loss": loss,
        **dict(reversed(layers("gradients", gradients))),
    }


def eval_step(
    state: TrainState,
    batch: Batch,
    normalize: Callable[[Any], ArrayLike] = lambda images: images,
    flip: bool = False,
    loss: str = "softmax",
    per_class: bool = False,
) -> dict[str, jax.Array]:
    """Return sums over one batch.

    Args:
      state: the state to evaluate. If it has exponential moving averages, these are evaluated.
      batch: `image` (N, H, W, C), `label` (N,) integers or (N, K) floats, and `weight` (N,) floats: 1, or 0 for an
        example that does not count.
      normalize: from batch["image"] to normalized float images; by default they are normalized already.
      flip: average the logits of each image and its horizontal flip.
      loss: softmax, sigmoid or squared_error.
      per_class: return the sums of each class too; not for squared_error.

    Returns:
      The sums of the `loss`, of the `correct` answers (except for squared_error) and of the `count` of examples, all
      scalars; with `per_class` also `class_correct` and `class_count`, (K,), see `losses.class_sums`.
    """
    images = jnp.asarray(normalize(batch["image"]))
    views = images[:, None] if not flip else jnp.stack([images, images[:, :, ::-1]], 1)
    # Both views go through the network in one pass, side by side, so that each device keeps its examples. Two passes
    # take twice as long to compile, and XLA:CPU keeps the feature maps of both (VGG-16 with batch norm at 32x32,
    # batch 512: 805 MiB instead of 657).
    logits = state.apply_fn(state.evaluated_variables, views.reshape(-1, *images.shape[1:]), train=False)
    logits = logits.reshape(*views.shape[:2], -1).mean(1)
    labels, weight = jnp.asarray(batch["label"]), jnp.asarray(batch["weight"])
    sums = {"loss": (example_losses(logits, labels, loss) * weight).sum(), "count": weight.sum()}
    if loss != "squared_error":
        sums["correct"] = (share_right(logits, labels, loss) * weight).sum()
    if per_class:
        sums |= class_sums(logits, labels, weight, loss)
    return sums


def evaluate(step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Batch]) -> dict[str, Any]:
    """Return the mean `loss`, the `accuracy` (for squared_error the `rmse`) and the `count` of all examples.

    If the step gives the sums of each class, `class_accuracy` holds an accuracy for each; NaN if it has no examples.

    Args:
      step: `eval_step` with its state bound: from a batch to the sums over it.
      batches: one or more, with each example once; those of weight 0 do not count.
    """
    sums: list[dict[str, np.ndarray]] = []
    unread: dict[str, jax.Array] | None = None
    for batch in batches:
        # Dispatch one step ahead, not all: XLA:CPU allocates the temporary arrays of a step when it is dispatched.
        unread, last = step(batch), unread
        sums += [jax.device_get(last)] if last else []
    sums += [jax.device_get(unread)] if unread else []
    loss, correct, count = (sum(float(s.get(key, 0)) for s in sums) for key in ("loss", "correct", "count"))
    metric = {"accuracy": correct / count} if "correct" in sums[0] else {"rmse": math.sqrt(loss / count)}
    result: dict[str, Any] = {"loss": loss / count, **metric, "count": int(count)}
    if "class_count" in sums[0]:
        right, total = (np.stack([s[key] for s in sums]).sum(0) for key in ("class_correct", "class_count"))
        result["class_accuracy"] = np.where(total > 0, right / np.maximum(total, 1), math.nan).tolist()
    return result
