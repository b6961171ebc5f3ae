"""The training state and the pure functions that make and advance it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from vgg_jax.model import VGG


class TrainState(train_state.TrainState):
    """Step, parameters, optimizer state, and batch norm's running statistics (empty without batch norm)."""

    batch_stats: Any


def create_train_state(
    key: jax.Array, model: VGG, optimizer: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
    """A state at step 0 with torchvision's initialisation, for images of shape (H, W, C)."""
    variables = model.init(key, jnp.zeros((1, *image_shape), model.dtype))
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optimizer,
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    augment: Callable[[jax.Array, jax.Array], jax.Array] = lambda key, images: images,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer on one batch. Pure; jit it with `augment` bound and the state donated.

    Args:
      state: the state before the step.
      batch: `image` (N, H, W, C) and `label` (N,) integers below the number of classes.
      key: the run's key; augmentation and dropout use what is folded from it and the state's step.
      augment: from (key, batch["image"]) to normalised float images.

    Returns:
      The state after the step, and the batch's mean `loss` (cross entropy) and `accuracy` before it, as scalars.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = augment(augment_key, batch["image"])

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, (logits, updates.get("batch_stats", {}))

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), {"loss": loss, "accuracy": accuracy}


def eval_step(
    state: TrainState, batch: dict[str, jax.Array], normalize: Callable[[jax.Array], jax.Array] = lambda images: images
) -> dict[str, jax.Array]:
    """Sums over one batch: of the `loss`, of the `correct` predictions and of the `count` of examples.

    Args:
      state: the state to evaluate.
      batch: `image`, `label` as for `train_step`, and `weight` (N,): 1, or 0 for an example that does not count.
      normalize: from batch["image"] to normalised float images.
    """
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, normalize(batch["image"]), train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(-1) == batch["label"]
    weight = batch["weight"]
    return {"loss": (losses * weight).sum(), "correct": (correct * weight).sum(), "count": weight.sum()}
