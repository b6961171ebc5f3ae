"""The commands of the guides run, with narrow networks, small data and the weights that a reader would download."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import photographs, random_variables, write_cifar10, write_tfds
from tests.data.archives import prepare_imagenet
from tests.narrow import NARROW_TABLE
from tests.site.test_code_blocks import commands, subcommand
from vgg_jax import AUTHORS, CIFAR10, IMAGENET, VGG, Network, to_torch
from vgg_jax.weights.imagenet_classes import imagenet_classes

ROOT = pathlib.Path(__file__).parent.parent.parent
RUN = """
import json
import os
import shlex
import sys

from tests.narrow import NARROW_TABLE
from vgg_jax.model import TABLE_1
from vgg_jax.weights import download

TABLE_1.update(NARROW_TABLE)
found = json.load(open("commands.json"))
download.AUTHORS_MD5["vgg16_caffe"] = found["md5"]
from vgg_jax.__main__ import main

for words in found["commands"]:
    print("---", shlex.join(words), flush=True)
    if os.fork() == 0:  # a process for each command, which need not import the modules again
        sys.exit(main(words))
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code:
        sys.exit(f"{shlex.join(words)} ended with exit code {code}")
"""
SHORT_RUN = [
    "--config.num_epochs=2",
    "--config.batch_size=8",
    "--config.eval_batch_size=8",
    "--config.features_dir=kept",
]
SMALL_DATA = {
    "train[:49000]": "train[:40]",
    "train[49000:]": "train[40:]",
    "CONTENT": "photo.jpg",
    "STYLE": "photo.jpg",
}
# test_readme.py compares this conversion with torchvision's networks of full width, and .ci/run trains the digits.
LEFT_OUT = (["convert", "vgg11.safetensors", "vgg11.pth", "--check"], ["train", "--config", "configs/digits.py"])
# test_pages.py and .ci/fresh_machine.py run these pages.
RUN_ELSEWHERE = {"docs/quickstart.md", "docs/contributing.md", "CONTRIBUTING.md"}
PAGES = sorted({page for page, words in commands() if subcommand(words)} - RUN_ELSEWHERE)


def save_networks(cache):
    """Write narrow networks under the names of the pretrained ones."""
    os.makedirs(cache)
    for name, depth, batch_norm in (("vgg16", 16, False), ("vgg16_bn", 16, True), ("vgg19", 19, False)):
        model = VGG(depth, batch_norm=batch_norm, hidden=(64, 64))
        net = Network(model, random_variables(model, 224, 224, 3), IMAGENET, imagenet_classes())
        net.save(cache / f"{name}.safetensors")
    model = VGG(16, hidden=(), num_classes=None)
    Network(model, random_variables(model, 224, 224, 3), AUTHORS).save(cache / "vgg16_caffe.weights.h5")
    (cache / "vgg16_caffe.weights.h5").rename(cache / "vgg16_caffe.h5")


def save_images(folder):
    """Write an image folder in the shape of CIFAR-10, one of photographs, and single photographs."""
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for label in range(10):
            directory = folder / "CIFAR-10-images" / split / f"class{label}"
            directory.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(directory / f"{i}.png")
    for i, photograph in enumerate(photographs(24)):
        directory = folder / "photos" / ("train" if i % 3 else "test") / f"kind{i % 2}"
        directory.mkdir(parents=True, exist_ok=True)
        photograph.save(directory / f"{i}.jpg")
    shutil.copytree(folder / "photos" / "train", folder / "data" / "train")
    shutil.copytree(folder / "photos" / "train" / "kind0", folder / "folder")
    for name in ("photo.jpg", "photo.png"):
        photographs(1)[0].save(folder / name)


def save_labels(folder):
    """Write a TFDS data set with several labels for an image."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
        "label": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=6)),
    }
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    splits = {"train": [{"image": image, "label": [i % 6, 5]} for i in range(16)]}
    splits["test"] = splits["train"][:8]
    write_tfds(folder, "scenes", "1.0.0", features, splits)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Return the folder of a reader who has data, weights and a run."""
    import torch

    folder = tmp_path_factory.mktemp("reader")
    save_images(folder)
    save_labels(folder)
    write_cifar10(folder / "tfds", 40, 16)
    prepare_imagenet(folder / "tfds")
    names = tuple(f"class{label}" for label in range(10))
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        save_networks(folder / "cache")
        model = VGG(11, batch_norm=True, num_classes=10, pool_size=1, hidden=())
        variables = random_variables(model, 32, 32, 3)
        arrays = {name: torch.tensor(np.asarray(array)) for name, array in to_torch(model, variables).items()}
        for name in ("checkpoint.pth", "theirs.pth"):
            torch.save({"state_dict": arrays}, folder / name)
        for name in ("small.safetensors", "vgg11.safetensors"):
            Network(model, variables, CIFAR10, names).save(folder / name)
    hidden = ["--config.model.hidden=(16,16)", "--workdir", "runs/mine"]
    shutil.copy(folder / "cache" / "vgg16.safetensors", folder)
    run_commands([["train", "--config", "vgg11", *hidden, *SHORT_RUN]], folder)
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "cifar")
    return folder


def run_commands(found, folder):
    """Run commands in a folder, one after the other."""
    digest = hashlib.md5((folder / "cache" / "vgg16_caffe.h5").read_bytes()).hexdigest()
    (folder / "commands.json").write_text(json.dumps({"md5": digest, "commands": found}))
    settings = {
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "VGG_JAX_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-c", RUN]
    ran = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


def arguments(words):
    """Return the words of a command after vgg-jax."""
    name = subcommand(words)
    return [name, *words[words.index("train.py" if "train.py" in words else name) + 1 :]]


def shortened(words):
    """Return the words of a command with small data and few steps."""
    name, *words = words
    for text, small in SMALL_DATA.items():
        words = [word.replace(text, small) for word in words]
    if name == "train":
        words += SHORT_RUN
        if words[1].endswith(".py"):
            words[1] = str(ROOT / words[1])
    if name == "style-transfer":
        words = [*("out.png" if word == "OUT" else word for word in words), "--steps", "2"]
    return [name, *words]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(page, reader, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(reader, folder)
    if page in ("README.md", "docs/training.md"):  # they train this run
        shutil.rmtree(folder / "runs" / "mine")
    if page == "docs/embeddings.md":
        (folder / "photos").rename(folder / "flowers")
        shutil.copytree(folder / "flowers" / "train", folder / "photos")
    found = [arguments(words) for where, words in commands() if where == page and subcommand(words)]
    run_commands([shortened(words) for words in found if words not in LEFT_OUT], folder)
