"""Extraction of features beside the bare forward pass: python benchmarks/extract.py [--side 32|224] [--images N] [...]

Writes N JPEGs of noise in a temporary folder (or takes those of --folder), and in turn measures

  bare     the forward pass alone: batches of decoded images in memory, to the layer, with the pooling of the features;
           the network is optimized for inference, as in `extract`; the results stay on the device, except the last
  extract  `vgg-jax extract`: reads and decodes files, computes, writes parts and the final file

and prints the images per second of each and the ratio of their medians. Both are measured from the first batch that is
complete on, so that neither counts compilation. The seconds from the last batch to the complete file are printed beside
and count for `extract`. The network is VGG-16 with random weights, with batch norm at 32x32.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the command
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vgg_jax import CIFAR10, IMAGENET, VGG
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation import extraction as extraction_module
from vgg_jax.evaluation.embeddings import Extraction
from vgg_jax.evaluation.extraction import extract
from vgg_jax.evaluation.image_sources import open_source
from vgg_jax.evaluation.optimized import optimized_on_cpu
from vgg_jax.evaluation.parts import PartFiles, Rows
from vgg_jax.evaluation.pooled_features import FeatureOptions, image_features
from vgg_jax.runtime import compiler_options, configure

PHOTOGRAPH = (500, 375)  # width and height of the usual ImageNet photograph


Net = tuple[VGG, dict, Preprocessing]


class TimedParts(PartFiles):
    """The files of an extraction, and the time at which each batch arrived."""

    times: list[tuple[float, float, int]] = []

    def add(self, start: int, rows: Rows) -> None:
        """Keep rows, and the time."""
        super().add(start, rows)
        self.times.append((time.perf_counter(), time.process_time(), len(next(iter(rows.values())))))


def write_images(folder: str, count: int, side: int) -> None:
    """Write JPEGs of smooth noise: of 32x32, or of the size of photographs."""
    random = np.random.default_rng(0)
    size = (side, side) if side <= 64 else PHOTOGRAPH
    for i in range(count):
        noise = PIL.Image.fromarray(random.integers(0, 256, (max(4, size[1] // 8), max(4, size[0] // 8), 3), np.uint8))
        noise.resize(size).save(os.path.join(folder, f"{i:06d}.jpg"), quality=85)


def network(side: int) -> Net:
    """Return VGG-16, random weights and the preprocessing."""
    small = side <= 64
    model = VGG(16, batch_norm=True, num_classes=10, pool_size=1, hidden=()) if small else VGG(16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        std = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return np.abs(std * random.standard_normal(leaf.shape, np.float32))  # no negative variances

    return model, jax.tree.map(draw, shapes), CIFAR10 if small else IMAGENET


def bare_rate(
    model: VGG, variables: dict, preprocessing: Preprocessing, options: FeatureOptions, shape: tuple, images: int
) -> tuple[float, float]:
    """Return the images per second of the forward pass alone, and those per processor second."""
    model, variables = optimized_on_cpu(model, variables, shape, 1)
    function = functools.partial(image_features, model, preprocessing, options, False)
    program = jax.jit(function, compiler_options=compiler_options())
    variables = jax.device_put(variables)
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    inputs = jax.device_put((batch, np.full((len(batch), 2), shape[1], np.int32)))
    jax.block_until_ready(program(variables, *inputs))
    count = max(2, images // len(batch))
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        found = program(variables, *inputs)
    jax.block_until_ready(found)
    done = count * len(batch)
    return done / (time.perf_counter() - start), done / (time.process_time() - used)


def extract_rate(net: Net, folder: str, options: FeatureOptions, out: str) -> tuple[float, float, float]:
    """Return the images per second of the extraction, those per processor second, and the seconds after the last."""
    TimedParts.times = []
    extract(*net, open_source(folder, net[2]), options, out)
    end, end_used = time.perf_counter(), time.process_time()
    (first, first_used, _), *others = TimedParts.times
    os.remove(out)
    images = sum(count for _, _, count in others)
    return images / (end - first), images / (end_used - first_used), end - others[-1][0]


def main() -> None:
    """Measure both in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, choices=(32, 224), default=32, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, help="(default: 10000 at 32, 320 at 224)")
    parser.add_argument("--folder", help="a folder of JPEGs instead of noise")
    parser.add_argument("--layer", help="(default: pool5 at 32, fc7 at 224)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args()
    configure()
    setattr(extraction_module, "PartFiles", TimedParts)  # noqa: B010 - mypy refuses the assignment of a class
    net = network(options.side)
    choices = FeatureOptions((options.layer or ("pool5" if options.side == 32 else "fc7"),))
    rates: dict[str, list[tuple[float, float]]] = {"bare": [], "extract": []}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as results:
        if not options.folder:
            write_images(folder, options.images or (10_000 if options.side == 32 else 320), options.side)
        source = open_source(options.folder or folder, net[2])
        batch = Extraction(*net, source, choices).plan.batches[0]
        shape = (batch.size, *batch.shape, 3)
        print(f"{len(source)} images, batches of {batch.size}, layer {choices.layers[0]}", flush=True)
        for _ in range(options.rounds):
            rates["bare"].append(bare_rate(*net, choices, shape, len(source)))
            *rate, seconds = extract_rate(net, options.folder or folder, choices, os.path.join(results, "out.npz"))
            rates["extract"].append((rate[0], rate[1]))
            for name, found in rates.items():
                print(f"{name} {found[-1][0]:.2f} images/s, {found[-1][1]:.2f} images per processor second", flush=True)
            print(f"{seconds:.2f} s to complete the file", flush=True)
    for place, unit in enumerate(("images/s", "images per processor second")):
        extracted, bare = (statistics.median(rate[place] for rate in rates[name]) for name in ("extract", "bare"))
        print(f"extract over bare: {extracted / bare:.3f} in {unit} (medians)")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
