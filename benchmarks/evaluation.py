"""Evaluation of photographs of many sizes with an empty compilation cache: in padded buckets, or size by size.

    python benchmarks/evaluation.py FOLDER [--images N] [--protocol PROTOCOL] [--narrow] [--batch-size N] [--rounds N]
        [--float64] [--arms ARM ARM ...] [--before TREE] [--devices N]

FOLDER has image files, in subfolders too. The arms evaluate them in turn, each in a process of its own:

  buckets  as `python -m vgg_jax evaluate` does
  sizes    a program for each size, an image at a time on one device, decoded in one thread, waiting for each result
  before   as `evaluate` of the source tree --before does, such as a checkout of 5cd4714, the last one without buckets
  devices  as `buckets`, on N simulated devices (default: 8)

Prints the images per second of each arm from the first image to the last result, the programs that it compiled, its
processor seconds and its largest memory; then the largest difference between its posteriors and those of the first arm.
The network is VGG-16 with random weights; with --narrow it has an eighth of the channels. In float32, the posteriors of
two arms differ by rounding, because the arms compute convolutions by different methods; in float64, by that of the
normalized images, which are float32.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the command
ROOT = os.environ.get("VGG_JAX_TREE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax  # noqa: E402 - after the environment variable
import jax.monitoring  # noqa: E402 - after the environment variable
import jax.numpy as jnp  # noqa: E402 - after the environment variable
import numpy as np  # noqa: E402 - for the same order everywhere
import PIL.Image  # noqa: E402 - for the same order everywhere

from vgg_jax.data import image_files  # noqa: E402 - after the path
from vgg_jax.data.listing import find_images  # noqa: E402 - after the path
from vgg_jax.data.preprocessing import Preprocessing  # noqa: E402 - after the path
from vgg_jax.evaluation.posteriors import evaluate_split  # noqa: E402 - after the path
from vgg_jax.evaluation.protocols import (  # noqa: E402 - after the path
    PROTOCOLS,
    center_posteriors,
    crop_posteriors,
    dense_posteriors,
    grid_crops,
)
from vgg_jax.model import TABLE_1, VGG  # noqa: E402 - after the path
from vgg_jax.runtime import configure  # noqa: E402 - after the path

SCALES = ("256", 256, (224, 256, 288))  # the paper's for S = 256
ARMS = ("buckets", "sizes", "before", "devices")


@dataclasses.dataclass
class Files:
    """The image files of a folder as a split."""

    paths: list[str]
    name: str = "files/test"
    num_classes: int = 1000
    channels: int = 3
    label_shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def image(self, index: int) -> tuple[PIL.Image.Image, int]:
        """Return an image and the label 0."""
        with open(self.paths[index], "rb") as file:
            return PIL.Image.fromarray(image_files.decode_file(file.read(), "RGB")), 0

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image."""
        with open(self.paths[index], "rb") as file:
            return image_files.file_size(file.read(), "RGB")


def network(narrow: bool, dtype: Any = np.float32) -> tuple[VGG, Any]:
    """Return VGG-16 and random weights whose posteriors differ between images."""
    if narrow:
        for column, stages in TABLE_1.items():
            one, two, three, four, five = (tuple(width // 8 for width in stage) for stage in stages)
            TABLE_1[column] = (one, two, three, four, five)
    model = VGG(16, hidden=(512, 512) if narrow else (4096, 4096), dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        std = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return np.asarray(std * random.standard_normal(leaf.shape, np.float32), dtype)

    return model, jax.tree.map(draw, shapes)


def by_command(net: tuple[VGG, Any], files: Files, protocols: list[str], batch_size: int) -> Iterator[np.ndarray]:
    """Yield the posteriors of each protocol as the command computes them."""
    results = evaluate_split(*net, Preprocessing(), files, protocols, SCALES, batch_size)
    return (result.posteriors for result in results)


def by_sizes(net: tuple[VGG, Any], files: Files, protocols: list[str], batch_size: int) -> Iterator[np.ndarray]:
    """Yield the posteriors of each protocol, computed one image at a time."""
    model, variables = net
    variables = jax.device_put(variables)
    prepare = Preprocessing()
    center, dense, crops = (
        jax.jit(lambda variables, images, view=view: view(model, variables, images))
        for view in (center_posteriors, dense_posteriors, crop_posteriors)
    )
    parts: dict[tuple[str, int], np.ndarray] = {}

    def part(view: str, scale: int) -> np.ndarray:
        if (view, scale) not in parts:
            rows = []
            for i in range(len(files)):
                image = files.image(i)[0]
                if view == "center_crop":
                    rows.append(np.asarray(center(variables, prepare(image)[None])[0]))
                elif view == "dense":
                    rows.append(np.asarray(dense(variables, prepare.uncropped(image, scale)[None])[0]))
                else:
                    rows.append(np.asarray(crops(variables, grid_crops(prepare.uncropped(image, scale), prepare.crop))))
            parts[view, scale] = np.stack(rows)
        return parts[view, scale]

    scales = {"center_crop": (256,), "dense": SCALES[1:2]}
    views = {"multi_scale": ("dense",), "dense+multi_crop": ("dense", "multi_crop")}
    for protocol in protocols:
        pairs = [(v, q) for v in views.get(protocol, (protocol,)) for q in scales.get(protocol, SCALES[2])]
        yield np.mean([part(view, scale) for view, scale in pairs], axis=0)


def measure(options: argparse.Namespace) -> None:
    """Evaluate by one arm and print the figures as JSON; save the posteriors."""
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if event.endswith("backend_compile_duration") else None
    )
    configure()
    protocols = list(PROTOCOLS) if options.protocol == "all" else [options.protocol]
    files = Files([path for path, _ in find_images(options.folder)][: options.images])
    net = network(options.narrow, np.float64 if options.float64 else np.float32)
    programs.clear()  # small ones of the setup
    start = time.perf_counter()
    arm = by_sizes if options.arm == "sizes" else by_command
    posteriors = list(arm(net, files, protocols, options.batch_size))
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    np.savez(options.save, **dict(zip(protocols, posteriors, strict=True)))
    figures = {
        "images": len(files),
        "seconds": seconds,
        "programs": len(programs),
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss // 1024,
    }
    print(json.dumps(figures))


def run_arm(arm: str, environment: dict[str, str], directory: str) -> float:
    """Evaluate by one arm in a process of its own with an empty cache, print, and return the images per second."""
    save = os.path.join(directory, f"{arm}.npz")
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--arm", arm, "--save", save]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | environment | {"JAX_COMPILATION_CACHE_DIR": cache}
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(printed.stdout.splitlines()[-1])
    rate: float = figures["images"] / figures["seconds"]
    print(
        f"{arm}: {figures['images']} images in {figures['seconds']:.1f} s, {rate:.3f} images/s, "
        f"{figures['programs']} programs, {figures['processor_seconds']:.0f} processor seconds, "
        f"{figures['mib']:,} MiB",
        flush=True,
    )
    return rate


def main() -> None:
    """Measure the arms in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder of image files")
    parser.add_argument("--images", type=int, help="the number of images (default: all)")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, "all"), default="all", help="(default: %(default)s)")
    parser.add_argument("--narrow", action="store_true", help="an eighth of the channels")
    parser.add_argument("--batch-size", type=int, default=16, help="as of the command (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="evaluations by each arm (default: %(default)s)")
    parser.add_argument("--float64", action="store_true", help="compute in float64 instead of float32")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:2], help="(default: %(default)s)")
    parser.add_argument("--before", metavar="TREE", default=ROOT, help="the source tree of the arm `before`")
    parser.add_argument("--devices", metavar="N", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        measure(options)
        return
    environments = {
        "before": {"VGG_JAX_TREE": os.path.abspath(options.before)},
        "devices": {"XLA_FLAGS": f"--xla_force_host_platform_device_count={options.devices}"},
    }
    rates: dict[str, list[float]] = {arm: [] for arm in options.arms}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for arm in options.arms:
                environment = environments.get(arm, {}) | {"JAX_ENABLE_X64": str(options.float64)}
                rates[arm].append(run_arm(arm, environment, directory))
        saved = {arm: np.load(os.path.join(directory, f"{arm}.npz")) for arm in options.arms}
        first, *others = options.arms
        for arm in others:
            ratio = statistics.median(rates[first]) / statistics.median(rates[arm])
            difference = max(float(np.abs(saved[first][name] - saved[arm][name]).max()) for name in saved[first])
            print(f"{first} over {arm}: {ratio:.2f} in images/s (medians), largest difference {difference:.1e}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
