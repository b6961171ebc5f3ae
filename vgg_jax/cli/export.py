"""Export a network to another program, with its preprocessing and class names.

    python -m vgg_jax export SOURCE TARGET [--layout NHWC] [--uint8] [--dynamic-size] [--fold] [--softmax] [...]

SOURCE is a pretrained network's name, a file of weights, or a run's directory. TARGET ends in .onnx. By default the
graph takes any number of normalized images (N, C, H, W) of the size of the preprocessing, and gives logits. With
--int8, ONNX Runtime quantizes the network after it has seen the images of a folder.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.console import note
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.export.onnx_file import check_onnx_target, error_against_onnx_runtime, write_onnx
from vgg_jax.export.onnx_int8 import write_int8
from vgg_jax.export.onnx_options import LAYOUTS, OnnxOptions
from vgg_jax.runtime import configure


def export(options: argparse.Namespace) -> int:
    """Read the source, write the target, and compare the outputs on request; return the exit code."""
    source, target = options.source, options.target
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"{target} is the source itself; expected another file: choose another target")
    check_onnx_target(target)
    choices = OnnxOptions(
        options.layout,
        options.uint8,
        options.batch,
        _size(options.size),
        options.dynamic_size,
        options.fold,
        options.softmax,
    )
    net = load_network(source, options)
    loaded = net.loaded
    norm = " with batch norm" if net.model.batch_norm else ""
    if options.int8:
        count = write_int8(target, loaded, options.int8, choices)
        norm = f"{norm and norm + ' folded'} in int8, calibrated by {count} images"
    else:
        write_onnx(target, loaded, choices)
        norm += " folded" if choices.fold and norm else ""
    print(f"{target}: VGG-{net.model.depth}{norm}, {os.path.getsize(target) / 1e6:,.1f} MB")
    if net.preprocessing is None:
        note(f"{target} states no preprocessing, because {source} does not; add --preprocessing NAME")
    if options.check:
        error = error_against_onnx_runtime(target, loaded, choices)
        print(f"outputs of ONNX Runtime against vgg_jax's: relative error {error:.1e}")
        if not options.int8 and not error < 1e-5:  # float32 sums in another order give 1e-6
            print("expected less than 1e-5: the file does not give the same network", file=sys.stderr)
            return 1
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    """Return the height and width that a text such as 224 or 160x97 states."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in sides):
        raise UserError(f"--size is {text!r}; expected a side, or the height and the width, as 224 or 160x96")
    return int(sides[0]), int(sides[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax export", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("source", help="a pretrained network's name, a file of weights, or a run's directory")
    parser.add_argument("target", help="a file that ends in .onnx")
    group = parser.add_argument_group("ONNX")
    group.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="axes of the images (default: %(default)s)")
    group.add_argument("--uint8", action="store_true", help="take RGB or gray pixels of 0 to 255, and normalize inside")
    group.add_argument("--batch", type=int, metavar="N", help="number of images (default: any number)")
    group.add_argument("--size", metavar="HxW", help="height and width of the images (default: the crop, or 224)")
    group.add_argument("--dynamic-size", action="store_true", help="take any height and width (needs pool_size 1)")
    group.add_argument(
        "--fold", action=argparse.BooleanOptionalAction, default=False, help="fold batch norm (default: keep it)"
    )
    group.add_argument("--softmax", action="store_true", help="give probabilities instead of logits")
    group.add_argument("--int8", metavar="FOLDER", help="quantize to 8 bits, calibrated by the images of the folder")
    group.add_argument("--check", action="store_true", help="compare the outputs with those of ONNX Runtime")
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("export", lambda: export(options))
