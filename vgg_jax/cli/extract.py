"""Write the features of images to a file.

    python -m vgg_jax extract --weights vgg16|FILE|RUN --layer fc7 SOURCE OUT [...]

SOURCE is an image, a folder of images, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, or a data set of TFDS. OUT ends in
.npz, .safetensors or .parquet. It has the features of each layer, the names and the labels of the images, the layers,
the preprocessing and the hash of the weights.

By default the features are those of the network's test view, and maps are averaged over positions. With --scales they
are those of the paper's appendix B: whole images at several scales, averaged over positions, the horizontal flip and
scales, and divided by their L2 norm.

The same command resumes a run that was killed, from the folder OUT.parts. An image that cannot be read is reported on
standard error and left out, and the exit code is 1.
"""

import argparse
from collections.abc import Sequence

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.config import DataConfig
from vgg_jax.console import log
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.evaluation.embedding_files import check_path
from vgg_jax.evaluation.extraction import extract
from vgg_jax.evaluation.image_sources import open_source
from vgg_jax.evaluation.pooled_features import COMBINATIONS, POOLS, FeatureOptions
from vgg_jax.runtime import configure
from vgg_jax.weights.download import NAMES


def feature_options(options: argparse.Namespace) -> FeatureOptions:
    """Return the choices of the features.

    Raises:
      UserError: if they contradict each other.
    """
    layers = tuple(name for text in options.layer for name in text.split(","))
    try:
        scales = tuple(int(part) for text in options.scales for part in text.split(","))
    except ValueError:
        raise UserError(f"--scales is {','.join(options.scales)}; expected numbers of pixels as 256,384,512") from None
    as_in_paper = bool(scales)
    flip = as_in_paper if options.flip is None else options.flip
    normalize = as_in_paper if options.normalize is None else options.normalize
    return FeatureOptions(layers, options.pool, scales, options.combine, flip, normalize)


def run(options: argparse.Namespace) -> int:
    """Extract the features; return the exit code: 1 if an image cannot be read."""
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; expected 1 or more")
    choices = feature_options(options)
    check_path(options.out)  # before the weights, which take seconds to load
    net = load_network(options.weights, options)
    preprocessing = net.checked_preprocessing()
    source = open_source(options.source, preprocessing, options.split, options.data_dir)
    found = extract(
        *(net.model, net.variables, preprocessing, source, choices),
        *(options.out, options.batch_size, options.overwrite),
    )
    state = "" if found.computed else " (complete before; nothing to compute)"
    unreadable = f", {found.unreadable:,} unreadable" if found.unreadable else ""
    plural = "" if found.images == 1 else "s"
    log(f"features of {found.images:,} image{plural}{unreadable}: {found.path}{state}")
    return 1 if found.unreadable else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax extract", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("source", metavar="SOURCE", help="an image, a folder, or a data set")
    parser.add_argument("out", metavar="OUT", help="the file to write: .npz, .safetensors or .parquet")
    parser.add_argument("--weights", required=True, help=f"one of {', '.join(NAMES)}, a file, or a run's directory")
    parser.add_argument(
        "--layer", required=True, action="append", help="fc7, relu7, pool5, ...; several with commas between them"
    )
    parser.add_argument(
        "--pool", choices=POOLS, default="average", help="maps over positions; none keeps maps (default: %(default)s)"
    )
    parser.add_argument(
        "--scales",
        metavar="Q,Q",
        action="append",
        default=[],
        help="short sides of whole images in pixels, as 256,384,512 (default: the test view of the network)",
    )
    parser.add_argument(
        "--combine", choices=COMBINATIONS, default="average", help="features of the scales (default: %(default)s)"
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--flip", action=flag, help="average over the horizontal flip (default: with --scales)")
    parser.add_argument("--normalize", action=flag, help="divide by the L2 norm (default: with --scales)")
    parser.add_argument("--split", help="split of a data set, such as train or train[:80%%]")
    parser.add_argument(
        "--data-dir", default=DataConfig().data_dir, help="TFDS's data directory (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images of the network's input size that each device computes together (default: as many as have the "
        "pixels of 16 images of 224x224, at most 128)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and unfinished features of other inputs")
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("extract", lambda: run(options), "lower --batch-size or --scales")
