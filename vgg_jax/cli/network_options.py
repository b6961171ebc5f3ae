"""The options of every command that loads a network: what its file does not state."""

import argparse

from vgg_jax.network import Network, load


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_network` to a command."""
    group = parser.add_argument_group("network", "what the source of the weights does not state")
    group.add_argument("--features-only", action="store_true", help="load the convolutional part without the head")
    group.add_argument("--step", default="latest", help="checkpoint of a run: latest, best or a step (default: latest)")


def load_network(source: str, options: argparse.Namespace) -> Network:
    """Return the network at `source`, read as the options of `add_network_options` say.

    Raises:
      UserError: as `vgg_jax.load`.
    """
    return load(source, features_only=options.features_only, step=options.step)
