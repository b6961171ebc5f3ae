"""Run a subcommand: python -m vgg_jax SUBCOMMAND, or vgg-jax SUBCOMMAND."""

import importlib
import os
import sys
from collections.abc import Sequence

from vgg_jax.platforms import log_level

# The module in vgg_jax.cli and the purpose of each subcommand.
SUBCOMMANDS = {
    "train": ("train", "train a network from a configuration file"),
    "evaluate": ("evaluate", "evaluate a network by the protocols of the paper"),
    "predict": ("predict", "classify images"),
    "extract": ("extract", "write the features of images to a file"),
    "probe": ("probe", "train a linear classifier on extracted features"),
    "explain": ("explain", "show which parts of an image speak for a class"),
    "convert": ("convert", "convert weights from one file format to another"),
    "export": ("export", "export a network to another program"),
    "prepare": ("prepare", "prepare a data set for training"),
    "statistics": ("statistics", "compute the mean, standard deviation and principal axes of a data set's pixels"),
    "style-transfer": ("style_transfer", "paint one image in the style of another"),
}
USAGE = "usage: vgg-jax SUBCOMMAND [...], with --help for its options\n\n" + "\n".join(
    f"  {name:15s} {purpose}" for name, (_, purpose) in SUBCOMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The subcommand's exit code, or 2 if there is no such subcommand.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE)
        return 0
    if name not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        print(f"vgg-jax: error: found no subcommand {name!r}; expected one of {known}", file=sys.stderr)
        return 2
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", log_level())  # JAX reads it at import
    module = importlib.import_module(f"vgg_jax.cli.{SUBCOMMANDS[name][0]}")
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
