"""Convert weights from one file format to another.

    python -m vgg_jax convert SOURCE TARGET [--check] [--preprocessing NAME] [--classes FILE] [...]

SOURCE is a pretrained network's name, a .pth, .safetensors or Keras file, a run's directory, a folder in timm's shape,
or hf-hub:OWNER/NAME. TARGET ends in .safetensors, .pth, .weights.h5 (Keras) or .stablehlo, or is a folder, which is
written in timm's shape: it ends in a slash or has no suffix. Depth, batch norm, classes and head are read off the
source. The target also states the preprocessing, the class names and the meaning of the outputs: those of the source,
or those of the options. With --check, the command also loads the target into torchvision's network and compares the
logits.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import jax

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.console import note
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.export.targets import check_writable
from vgg_jax.network import load
from vgg_jax.runtime import configure
from vgg_jax.weights.formats import load_file
from vgg_jax.weights.verification import error_against_torchvision


def convert(source: str, target: str, check: bool, options: argparse.Namespace | None = None) -> int:
    """Read `source`, write `target`, and compare logits on request; return the exit code."""
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"{target} is the source itself; expected another file: choose another target")
    check_writable(target)
    if check and not target.lower().endswith((".pth", ".pt", ".safetensors")):
        raise UserError(f"--check compares .pth and .safetensors files; found {target}: leave out --check")
    net = load_network(source, options) if options else load(source)
    net.save(target)
    model = net.model
    parameters = sum(leaf.size for leaf in jax.tree.leaves(net.variables["params"]))
    norm = " with batch norm" if model.batch_norm else ""
    outputs = "1 output" if model.num_classes == 1 else f"{model.num_classes} classes"
    head = outputs if model.num_classes is not None else "no classes" if model.hidden else "no head"
    print(f"{target}: VGG-{model.depth}{norm}, {head}, {parameters:,} parameters")
    if net.preprocessing is None:
        note(f"{target} states no preprocessing, because {source} does not; add --preprocessing NAME")
    if net.classes is None and model.num_classes is not None and net.outputs != "values":
        note(f"{target} states no class names, because {source} does not; add --classes FILE")
    if check:
        written = load_file(target)
        error = error_against_torchvision(written.model, written.variables)
        print(f"logits against torchvision's: relative error {error:.1e}")
        if not error < 1e-5:  # float32 sums in another order give 1e-6
            print("expected less than 1e-5: the weights do not give the same network", file=sys.stderr)
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax convert", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument(
        "source", help="a pretrained network's name, a .pth, .safetensors, .h5 or .keras file, or a run's directory"
    )
    parser.add_argument("target", help="a .safetensors, .pth, .weights.h5 or .stablehlo file, or a folder")
    parser.add_argument("--check", action="store_true", help="compare the logits with torchvision's")
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("convert", lambda: convert(options.source, options.target, options.check, options))
