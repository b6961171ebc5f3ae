"""Export a network to another program, with its preprocessing and class names.

    python -m vgg_jax export SOURCE TARGET [--size HxW] [--dynamic-size] [--softmax] [--layout NHWC] [--uint8] [...]

SOURCE is a pretrained network's name, a file of weights, a run's directory, a folder in timm's shape, or
hf-hub:OWNER/NAME. The end of TARGET decides the format: .onnx, .stablehlo, .weights.h5 (Keras), .safetensors or .pth,
or a folder in timm's shape, which ends in a slash or has no suffix. By default the program of an .onnx or .stablehlo
file takes any number of normalized images of the size of the preprocessing, and gives logits: (N, C, H, W) in ONNX,
(N, H, W, C) in StableHLO. With --int8, ONNX Runtime quantizes the network after it has seen the images of a folder.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.console import note
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.export.onnx_file import error_against_onnx_runtime, write_onnx
from vgg_jax.export.onnx_int8 import write_int8
from vgg_jax.export.onnx_options import LAYOUTS, OnnxOptions
from vgg_jax.export.stablehlo import PLATFORMS, SUFFIX
from vgg_jax.export.targets import check_writable
from vgg_jax.network import Network
from vgg_jax.runtime import configure

# The options that choose a program, by the suffixes that have them.
PROGRAM_OPTIONS = {
    **dict.fromkeys(("size", "dynamic_size", "softmax"), (".onnx", SUFFIX)),
    **dict.fromkeys(("layout", "uint8", "batch", "fold", "int8", "check"), (".onnx",)),
    **dict.fromkeys(("platforms", "beside"), (SUFFIX,)),
}


def export(options: argparse.Namespace) -> int:
    """Read the source, write the target, and compare the outputs on request; return the exit code."""
    source, target = options.source, options.target
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"{target} is the source itself; expected another file: choose another target")
    check_writable(target)
    suffix = os.path.splitext(target)[1].lower()
    _check_options(options, target, suffix)
    size = _size(options.size)
    settings = _stablehlo_settings(options, size) if suffix == SUFFIX else {}
    net = load_network(source, options)
    if suffix == ".onnx":
        return _export_onnx(net, options, size)
    net.save(target, **settings)
    print(f"{target}: {_name(net)}")
    _note_missing(net, source, target)
    return 0


def _export_onnx(net: Network, options: argparse.Namespace, size: tuple[int, int] | None) -> int:
    """Write an ONNX file, and compare it with ONNX Runtime on request; return the exit code."""
    target, loaded = options.target, net.loaded
    choices = OnnxOptions(
        options.layout or "NCHW",
        options.uint8,
        options.batch,
        size,
        options.dynamic_size,
        bool(options.fold),
        options.softmax,
    )
    if options.int8:
        count = write_int8(target, loaded, options.int8, choices)
        more = f"{' folded' if net.model.batch_norm else ''} in int8, calibrated by {count} images"
    else:
        write_onnx(target, loaded, choices)
        more = " folded" if choices.fold and net.model.batch_norm else ""
    print(f"{target}: {_name(net)}{more}, {os.path.getsize(target) / 1e6:,.1f} MB")
    _note_missing(net, options.source, target)
    if options.check:
        error = error_against_onnx_runtime(target, loaded, choices)
        print(f"outputs of ONNX Runtime against vgg_jax's: relative error {error:.1e}")
        if not options.int8 and not error < 1e-5:  # float32 sums in another order give 1e-6
            print("expected less than 1e-5: the file does not give the same network", file=sys.stderr)
            return 1
    return 0


def _check_options(options: argparse.Namespace, target: str, suffix: str) -> None:
    """Raise UserError if an option is given that the target's format does not have."""
    for name, suffixes in PROGRAM_OPTIONS.items():
        if suffix not in suffixes and getattr(options, name) not in (None, False):
            remedy = ", or run `vgg-jax convert --check` for .pth and .safetensors" if name == "check" else ""
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for {' and '.join(suffixes)} files; found {target}: leave it out{remedy}")


def _stablehlo_settings(options: argparse.Namespace, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the arguments of `save_stablehlo` that the options give."""
    if size and options.dynamic_size:
        raise UserError("found a size and a dynamic size; expected one of them")
    if size and size[0] != size[1]:
        raise UserError(f"--size is {size[0]}x{size[1]}; expected one side for StableHLO, or --dynamic-size")
    given = {
        "size": "any" if options.dynamic_size else size and size[0],
        "platforms": tuple(options.platforms.split(",")) if options.platforms else None,
        "beside": options.beside,
        "probabilities": options.softmax,
    }
    return {name: value for name, value in given.items() if value}


def _name(net: Network) -> str:
    return f"VGG-{net.model.depth}{' with batch norm' if net.model.batch_norm else ''}"


def _note_missing(net: Network, source: str, target: str) -> None:
    if net.preprocessing is None:
        note(f"{target} states no preprocessing, because {source} does not; add --preprocessing NAME")


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
    parser.add_argument(
        "target", help="a .onnx, .stablehlo, .weights.h5, .safetensors or .pth file, or a folder in timm's shape"
    )
    group = parser.add_argument_group("ONNX and StableHLO")
    group.add_argument("--size", metavar="HxW", help="height and width of the images (default: the crop, or 224)")
    group.add_argument(
        "--dynamic-size", action="store_true", help="take any height and width (ONNX: needs pool_size 1)"
    )
    group.add_argument("--softmax", action="store_true", help="give probabilities instead of logits")
    group = parser.add_argument_group("ONNX")
    group.add_argument("--layout", choices=LAYOUTS, help="axes of the images (default: NCHW)")
    group.add_argument("--uint8", action="store_true", help="take RGB or gray pixels of 0 to 255, and normalize inside")
    group.add_argument("--batch", type=int, metavar="N", help="number of images (default: any number)")
    group.add_argument("--fold", action=argparse.BooleanOptionalAction, help="fold batch norm (default: keep it)")
    group.add_argument("--int8", metavar="FOLDER", help="quantize to 8 bits, calibrated by the images of the folder")
    group.add_argument("--check", action="store_true", help="compare the outputs with those of ONNX Runtime")
    group = parser.add_argument_group("StableHLO")
    group.add_argument("--platforms", metavar="A,B", help=f"devices of the program (default: {','.join(PLATFORMS)})")
    group.add_argument("--beside", action="store_true", help="write the weights beside, to a .safetensors file")
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("export", lambda: export(options))
