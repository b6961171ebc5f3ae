"""Converts weights: python -m vgg_jax.convert SOURCE TARGET [--check]

Formats go by suffix: SOURCE is a .pth, .safetensors or Keras .h5 file, or a run's directory; TARGET ends in
.safetensors or .pth. Depth, batch norm, classes and head are read off the source. With --check, the target's weights
are put into torchvision's network too, and the logits compared.
"""

import argparse
import os
import sys

import jax
import numpy as np

from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.model import VGG
from vgg_jax.preprocess import IMAGENET
from vgg_jax.weight_files import check_target, load, load_with_preprocessing, save
from vgg_jax.weights import Variables, to_torch


def convert(source: str, target: str, check: bool) -> int:
    """Reads `source`, writes `target`, and compares logits on request; returns the exit code."""
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"{target} is the source itself; expected another file")
    check_target(target)
    model, variables, preprocessing = load_with_preprocessing(source)
    save(target, model, variables, preprocessing)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    print(
        f"{target}: VGG-{model.depth}{' with batch norm' if model.batch_norm else ''}, {model.num_classes} classes, "
        f"{parameters:,} parameters"
    )
    if not target.endswith(".safetensors") and preprocessing != IMAGENET:
        print(f"note: a .pth file cannot say that its images want {preprocessing}; a .safetensors file does")
    if check:
        error = compare_with_torchvision(*load(target))
        print(f"logits beside torchvision's: relative error {error:.1e}")
        if not error < 1e-5:  # float32 sums in another order give 1e-6
            print("expected less than 1e-5: the weights do not give the same network", file=sys.stderr)
            return 1
    return 0


def compare_with_torchvision(model: VGG, variables: Variables) -> float:
    """The relative error of our logits beside those of torchvision's network with the same weights."""
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--check needs torch and torchvision: {error}") from None
    own = VGG(model.depth, model.batch_norm, num_classes=model.num_classes)
    channels = variables["params"]["conv1_1"]["kernel"].shape[2]
    if (model.stages, model.head, model.pool_size, channels) != (own.stages, own.head, 7, 3) or not model.num_classes:
        raise UserError(
            "--check compares with torchvision's networks, which this one is not: it has another head, column, pools "
            "or channels"
        )
    name = f"vgg{model.depth}{'_bn' if model.batch_norm else ''}"
    net = getattr(torchvision.models, name)(weights=None, num_classes=model.num_classes).eval()
    state_dict = to_torch(model, jax.tree.map(lambda a: np.asarray(a, np.float32), variables))
    net.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits = np.asarray(jax.jit(model.clone(dtype=np.float32).apply)(variables, images))
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vgg_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help=".pth, .safetensors or .h5 file, or a run's directory")
    parser.add_argument("target", help=".safetensors or .pth file")
    parser.add_argument("--check", action="store_true", help="compare the logits with torchvision's")
    arguments = parser.parse_args()
    return report_mistakes("convert", lambda: convert(arguments.source, arguments.target, arguments.check))


if __name__ == "__main__":
    sys.exit(main())
