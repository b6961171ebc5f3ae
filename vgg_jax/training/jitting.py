"""The jitted steps of a run."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from vgg_jax.config import Config
from vgg_jax.runtime import compiler_options
from vgg_jax.training.blocks import several
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import eval_step, train_step


class Steps(NamedTuple):
    """The jitted steps of a run; those of training donate the state."""

    train_step: Any  # from (state, batch, key) to (state, metrics)
    train_steps: Any  # the same for several steps in one program, see `blocks.several`
    eval_step: Any  # from (state, batch) to sums over the batch


def jit_steps(
    config: Config,
    mesh: Mesh,
    shardings: TrainState,
    training_view: Callable[[jax.Array, Any], Any],
    test_view: Callable[[Any], ArrayLike],
    class_weights: Sequence[float] = (),
) -> Steps:
    """Return the jitted steps of a run.

    Args:
      config: the configuration of the run.
      mesh: the devices.
      shardings: the shardings of the state.
      training_view: from (key, batch of a loader) to the images and labels of the training step.
      test_view: from the images of a loader to those of the evaluation step.
      class_weights: the weights of the classes in the training loss; () if all are equal.
    """
    replicated, jit = NamedSharding(mesh, P()), functools.partial(jax.jit, compiler_options=compiler_options())
    step = functools.partial(
        train_step,
        augment=training_view,
        label_smoothing=config.label_smoothing,
        loss=config.loss,
        class_weights=class_weights,
    )
    evaluation = functools.partial(
        eval_step,
        normalize=test_view,
        flip=config.flip_eval,
        loss=config.loss,
        per_class=config.per_class_accuracy,
    )
    one, more = (
        jit(function, out_shardings=(shardings, replicated), donate_argnums=0) for function in (step, several(step))
    )
    return Steps(one, more, jit(evaluation, out_shardings=replicated))
