"""The data sets that are prepared here, without TensorFlow."""

from vgg_jax.data import cifar, digits, imagenet

NAMES = (digits.NAME, *cifar.ARCHIVES, imagenet.NAME)


def prepare(name: str, data_dir: str, manual_dir: str | None = None) -> None:
    """Prepares one of `NAMES` in `data_dir`, TFDS's data directory, where it is not there yet.

    Args:
      name: one of `NAMES`.
      data_dir: TFDS's data directory.
      manual_dir: where archives are that a user placed; by default `data_dir`/downloads/manual.

    Raises:
      UserError: where that cannot be done, with the reason and the remedy.
    """
    if name == digits.NAME:
        digits.prepare(data_dir)
    elif name == imagenet.NAME:
        imagenet.prepare(data_dir, manual_dir)
    else:
        cifar.prepare(name, data_dir, manual_dir)
