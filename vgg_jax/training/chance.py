"""The diagnosis of a network that has not begun to learn: its loss and accuracy are those of guessing."""

import math

from vgg_jax.config import Config

LOSS_TOLERANCE = 0.01  # of the logarithm of the number of classes
NOISE = 3.0  # standard deviations of the accuracy of guessing


def is_chance(loss: float, accuracy: float, count: int, num_classes: int) -> bool:
    """Return whether a cross entropy and an accuracy are those of a network that guesses among balanced classes.

    Args:
      loss: the mean cross entropy.
      accuracy: the accuracy on `count` examples.
      count: the number of examples.
      num_classes: the number of classes.
    """
    if num_classes < 2 or not count:
        return False
    chance = 1 / num_classes
    noise = NOISE * math.sqrt(chance * (1 - chance) / count)
    return abs(loss - math.log(num_classes)) <= LOSS_TOLERANCE * math.log(num_classes) and (
        abs(accuracy - chance) <= noise
    )


def diagnosis(config: Config, loss: float, accuracy: float, count: int) -> str:
    """Return a line that names remedies if a network of this configuration guesses; else an empty one.

    Args:
      config: the configuration of the run.
      loss: the mean training loss.
      accuracy: the accuracy of the evaluation.
      count: the examples of the evaluation.
    """
    num_classes = len(config.data.classes) or config.model.num_classes
    if not is_chance(loss, accuracy, count, num_classes):
        return ""
    plain = not config.model.batch_norm
    remedies = [
        "config.model.batch_norm=True" if plain else "",
        "config.init_from of a shallower trained network" if plain and not config.init_from else "",
        f"a lower or higher config.optimizer.learning_rate than {config.optimizer.learning_rate:g}",
        "config.optimizer.warmup_epochs" if not config.optimizer.warmup_epochs else "",
    ]
    return (
        f"at chance: training loss {loss:.3f} is ln({num_classes}), accuracy {accuracy:.1%} is 1/{num_classes}; "
        f"if the next epoch shows the same, try {' or '.join(filter(None, remedies))}"
    )
