"""The network of a run's directory: the weights of its latest or best checkpoint, or of a given step."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.config import LOSSES
from vgg_jax.console import note
from vgg_jax.errors import UserError, first_line
from vgg_jax.model import VGG
from vgg_jax.training.checkpoints import read_latest, read_step, saved_steps
from vgg_jax.training.checksums import named_leaves, read_metadata
from vgg_jax.training.class_names import output_names, preprocessing_of
from vgg_jax.training.metrics import evaluation_error
from vgg_jax.training.run_directory import read_config
from vgg_jax.training.state import evaluated_variables
from vgg_jax.training.validation import create_model
from vgg_jax.weights.formats import Loaded


def load_run(path: str | os.PathLike[str], step: str | int = "latest") -> Loaded:
    """Load the network that a run has trained.

    Args:
      path: the directory of the run.
      step: the checkpoint to load: latest, best (by the accuracy or rmse of its evaluation) or the number of a step.

    Returns:
      The model, its variables (the exponential moving averages if the run has any), the preprocessing of the run's
      evaluation, the class names of its data, and what the outputs mean.

    Raises:
      UserError: if the directory holds no run, no intact checkpoint, not this step, or a checkpoint of another network
        than its `config.json`.
    """
    path = os.fspath(path)
    config = read_config(path)
    directory = os.path.abspath(os.path.join(path, "checkpoints"))
    if not saved_steps(directory):
        raise UserError(f"{path} holds no checkpoint yet; expected a run that has saved one")
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError(
            f"{path} is a run in float64; expected JAX in 64-bit mode; set JAX_ENABLE_X64=1, or first call "
            'jax.config.update("jax_enable_x64", True)'
        )
    try:
        model = create_model(config.model)
    except ValueError as error:
        raise UserError(f"{path} is not the directory of a run: config.json: model.{error}") from None
    with _silent_orbax():
        arrays = _read(path, directory, str(step))
    variables = jax.tree.map(jnp.asarray, evaluated_variables(arrays))
    if not variables["batch_stats"]:
        del variables["batch_stats"]
    data = config.data
    _check_fits(path, model, variables, (data.image_size, data.image_size, len(data.mean)))
    names = output_names(data.class_names, model.num_classes)
    return Loaded(model, variables, preprocessing_of(data), names, LOSSES[config.loss])


def best_evaluation(directory: str) -> tuple[int, dict[str, float]] | None:
    """Return the step and the metrics of the checkpoint with the best evaluation; None if there is none."""
    best: tuple[int, dict[str, float]] | None = None
    for step in saved_steps(directory):
        try:
            metrics = read_metadata(os.path.join(directory, str(step)))["metrics"]
        except Exception as error:  # of many kinds, from Orbax and the system
            note(f"checkpoint of step {step} in {directory} is damaged: {first_line(error)}; not compared")
            continue
        if metrics and (best is None or evaluation_error(metrics) <= evaluation_error(best[1])):
            best = step, metrics
    return best


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Silence Orbax's warnings, which state that a directory opened for reading is not written."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(path: str, directory: str, step: str) -> dict[str, Any]:
    """Return the arrays of the latest checkpoint, the best one, or that of a step."""
    if step == "latest":
        return read_latest(directory)
    saved = saved_steps(directory)
    if step == "best":
        best = best_evaluation(directory)
        if best is None:
            raise UserError(f"{path} has no evaluated checkpoint; expected one for step best: use step latest")
        return read_step(directory, best[0])
    if not step.isdecimal() or int(step) not in saved:
        raise UserError(
            f"{path} has no checkpoint of step {step}; expected {', '.join(map(str, saved))}, latest or best: "
            "choose one of them"
        )
    return read_step(directory, int(step))


def _check_fits(path: str, model: VGG, variables: dict[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Raise UserError if the variables of a run's checkpoint do not fit the model of its configuration."""
    if image_shape[0] < model.smallest_image():
        raise UserError(
            f"{path} is not the directory of a run: config.json: data.image_size is {image_shape[0]}; expected at "
            f"least {model.smallest_image()}; restore the config.json of the run"
        )
    images = jax.ShapeDtypeStruct((1, *image_shape), model.dtype)
    shapes = [named_leaves(tree) for tree in (variables, jax.eval_shape(model.init, jax.random.key(0), images))]
    found, expected = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in shapes)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{path}: the checkpoint belongs to another network than config.json: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}; "
            "restore the config.json of the run"
        )
