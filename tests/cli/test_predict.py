"""`python -m vgg_jax predict`."""

import json
import struct
import subprocess
import sys
import zlib

import PIL.Image
import pytest

from tests.conftest import photographs, random_variables
from vgg_jax import VGG, Network
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.weights.imagenet_classes import imagenet_classes

MODEL = VGG(11, num_classes=1000, pool_size=1, hidden=())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    # Small images, so that the tests are quick.
    Network(MODEL, random_variables(MODEL, 32, 32, 3), Preprocessing(40, 32), imagenet_classes()).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of an image and a file that is not an image."""
    images = tmp_path / "images"
    images.mkdir()
    photographs(1)[0].resize((64, 50)).save(images / "00.jpg")
    (images / "broken.jpg").write_bytes(b"no image")
    return images


def run(*arguments):
    command = [sys.executable, "-m", "vgg_jax", "predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_unreadable_file_is_reported_and_the_others_answered(weights, folder):
    process = run("--weights", weights, "--json", "--top", 2, folder / "00.jpg", folder / "broken.jpg")
    assert process.returncode == 1
    first, second = (json.loads(line) for line in process.stdout.splitlines())
    assert [prediction.keys() for prediction in first["predictions"]] == [{"class", "name", "probability"}] * 2
    assert first["image"] == str(folder / "00.jpg")
    assert "broken.jpg" in second["error"]


def test_text_has_a_line_for_each_class(weights, folder):
    process = run("--weights", weights, folder / "00.jpg", folder / "nowhere.jpg")
    assert process.returncode == 1
    assert len(process.stdout.splitlines()) == 6
    assert "%" in process.stdout
    (error,) = process.stderr.splitlines()
    assert "nowhere.jpg" in error


def test_mistakes_give_one_line_and_exit_code_2(weights, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        (("--weights", "vgg12", folder), "vgg12 does not exist"),
        (("--weights", weights, tmp_path / "empty"), "is a folder without images"),
        (("--weights", weights, "--top", 0, folder), "--top is 0; expected 1 or more"),
    ):
        process = run(*arguments)
        assert process.returncode == 2
        (error,) = process.stderr.splitlines()
        assert part in error


def test_billion_pixels_are_refused_by_the_header(weights, tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 32_000, 32_000)  # width and height in the header of the file
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    process = run("--weights", weights, "--json", path)
    assert process.returncode == 1
    error = json.loads(process.stdout)["error"]
    assert "bomb.png: not a readable image: Image size (1024000000 pixels)" in error
