"""A network in int8 beside float32, on test images of CIFAR-10: python experiments/int8.py DATA NETWORK [--images 1000]

Writes the network (a run of experiments/cifar10_final.py, or its .safetensors file) with `vgg-jax export`, as float32
and as int8 calibrated by the training images of the folder DATA. ONNX Runtime classifies the same test images with
both, an equal number of each class. Writes int8.json and .md.
"""

import os
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import onnxruntime
import PIL.Image

from experiments.cifar10_runs import ROOT, parser, write
from vgg_jax import load

FILES = {"float32": (), "int8": ("--int8",)}


def test_images(data: str, count: int) -> tuple[list[str], list[str]]:
    """Return the paths and the classes of the first test images of each class."""
    folder = os.path.join(data, "test")
    names = sorted(os.listdir(folder))
    chosen = {name: sorted(os.listdir(os.path.join(folder, name)))[: count // len(names)] for name in names}
    found = [(os.path.join(folder, name, file), name) for name, files in chosen.items() for file in files]
    return [path for path, _ in found], [name for _, name in found]


def export(network: str, target: str, *options: str) -> None:
    """Run `vgg-jax export`."""
    command = [sys.executable, "-m", "vgg_jax", "export", network, target, *options]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ROOT})


def classes_of(path: str, images: np.ndarray) -> np.ndarray:
    """Return the most probable class of each image (N, 3, H, W) by ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images[i : i + 100]})[0] for i in range(0, len(images), 100)]
    found: np.ndarray = np.concatenate(logits).argmax(-1)
    return found


def main() -> None:
    """Export, classify, and write the results."""
    options = parser(__doc__ or "", "int8")
    options.add_argument("network", help="a run, or a file of weights with its classes")
    options.add_argument("--images", type=int, default=1000, help="test images (default: %(default)s)")
    chosen = options.parse_args()
    net = load(chosen.network)
    assert net.classes
    paths, names = test_images(chosen.data, chosen.images)
    images = np.stack([net.preprocess(PIL.Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    labels = np.array([net.classes.index(name) for name in names])
    found: dict[str, Any] = {}
    predicted = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, flags in FILES.items():
            target = os.path.join(scratch, f"{kind}.onnx")
            export(chosen.network, target, *flags, *([os.path.join(chosen.data, "train")] if flags else []))
            predicted[kind] = classes_of(target, np.ascontiguousarray(images, np.float32))
            found[kind] = {
                "bytes": os.path.getsize(target),
                "accuracy": float((predicted[kind] == labels).mean()),
            }
    agreement = float((predicted["int8"] == predicted["float32"]).mean())
    size = found["int8"]["bytes"] / found["float32"]["bytes"]
    lines = [
        "# A network in int8 by ONNX Runtime",
        "",
        f"The network of `experiments/cifar10_final.py`, calibrated by training images; {len(paths):,} test images.",
        *("", "| file | MiB | accuracy |", "|---|---|---|"),
        *(f"| {kind} | {v['bytes'] / 2**20:.1f} | {v['accuracy']:.1%} |" for kind, v in found.items()),
        "",
        f"Both name the same class for {agreement:.1%} of the images. The int8 file has {size:.3f} of the size.",
    ]
    write(chosen.out, "int8", {"images": len(paths), "agreement": agreement, "size": size, **found}, lines)
    print(f"{found}; agreement {agreement:.2%}, size {size:.3f}")


if __name__ == "__main__":
    main()
