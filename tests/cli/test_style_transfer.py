"""`python -m vgg_jax style-transfer`."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, random_variables
from vgg_jax import VGG, Network
from vgg_jax.data.preprocessing import IMAGENET, Preprocessing

MODEL = VGG(depth=11, num_classes=10, pool_size=1, hidden=())
COMMAND = [sys.executable, "-m", "vgg_jax", "style-transfer", "content.png", "style.jpg"]
OPTIONS = ["--weights", "net.safetensors", "--size", "40", "--steps", "3"]


@pytest.fixture
def folder(tmp_path):
    net = Network(MODEL, random_variables(MODEL, 32, 32, 3), IMAGENET)
    net.save(tmp_path / "net.safetensors")
    for name, image in zip(("content.png", "style.jpg"), photographs(2), strict=True):
        image.save(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_picture_starts_from_the_content(folder):
    subprocess.run([*COMMAND, "out.png", *OPTIONS, "--optimizer", "adam"], cwd=folder, check=True)
    with PIL.Image.open(folder / "out.png") as out, PIL.Image.open(folder / "content.png") as content:
        assert min(out.size) == 40
        # Three steps of Adam move each pixel by at most three times 0.02 of white: 16 of 255.
        expected = IMAGENET.to_image(IMAGENET.uncropped(content, 40))
        difference = np.asarray(out, int) - np.asarray(expected, int)
        assert 0 < np.abs(difference).max() <= 16


@pytest.mark.slow
def test_gray_network_paints_a_gray_picture(tmp_path):
    gray = Preprocessing(32, 32, (0.3,), (0.4,), "L")
    Network(MODEL, random_variables(MODEL, 32, 32, 1), gray).save(tmp_path / "net.safetensors")
    for name, image in zip(("content.png", "style.jpg"), photographs(2), strict=True):
        image.save(tmp_path / name)
    subprocess.run([*COMMAND, "out.png", *OPTIONS], cwd=tmp_path, check=True)
    with PIL.Image.open(tmp_path / "out.png") as out:
        assert (out.mode, min(out.size)) == ("L", 40)


def test_unreadable_image_gives_one_line(folder):
    process = subprocess.run(
        [*COMMAND[:4], "none.png", *COMMAND[5:], "x.png", *OPTIONS], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "none.png: not a readable image" in line


def test_wrong_arguments_give_one_line_each(folder):
    wrong = ["--size", "0", "--steps", "0", "--style-weight", "nan"]
    process = subprocess.run([*COMMAND, "no/x.abc", *OPTIONS, *wrong], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 2
    parts = (
        "--size is 0",
        "--steps is 0",
        "--style-weight is nan",
        "'.abc'",
        "no, the folder of no/x.abc, does not exist",
    )
    for line, part in zip(process.stderr.splitlines(), parts, strict=True):
        assert part in line


def test_size_is_checked_against_the_network(folder):
    """conv5_1 follows four max pools."""
    process = subprocess.run([*COMMAND, "x.png", *OPTIONS, "--size", "15"], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 2
    assert "--size is 15; expected at least 16" in process.stderr
