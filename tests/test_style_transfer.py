"""Style transfer moves an image's Gram matrices towards the style's, and keeps its content."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, random_variables, relative_error
from vgg_jax import VGG, features, save
from vgg_jax.perceptual import gram_matrix
from vgg_jax.preprocess import IMAGENET, Preprocessing
from vgg_jax.style_transfer import style_transfer

MODEL = VGG(depth=11, num_classes=10, pool_size=1, hidden=())


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, 32, 32, 3)


def test_the_weight_of_the_style_decides_between_content_and_style(variables):
    content, style = (jnp.asarray(IMAGENET.uncropped(image, 48))[None] for image in photographs(2))

    layers = ["conv1_1", "conv2_1", "conv3_1", "conv4_2"]
    maps = jax.jit(functools.partial(features, MODEL, layers=layers, average_pool=True))

    def distances(image):
        """From the content's activations, and from the style's Gram matrices."""
        found, own, wanted = (maps(variables, x) for x in (image, content, style))
        found_grams, wanted_grams = ([gram_matrix(maps[name]) for name in layers[:3]] for maps in (found, wanted))
        return relative_error(found["conv4_2"], own["conv4_2"]), relative_error(found_grams, wanted_grams)

    images = [
        style_transfer(MODEL, variables, content, style, style_weight=weight, steps=30, learning_rate=0.05)
        for weight in (0.0, 1.0, 1000.0)
    ]
    np.testing.assert_array_equal(images[0], content)  # nothing to gain
    assert images[1].shape == content.shape
    (_, start), (near, some), (far, most) = map(distances, images)
    assert most < some < start
    assert most < 0.5 * start
    assert near < far


def test_the_command(variables, tmp_path):
    save(tmp_path / "net.safetensors", MODEL, variables)
    for name, image in zip(("content.png", "style.jpg"), photographs(2), strict=True):
        image.save(tmp_path / name)
    command = [sys.executable, "-m", "vgg_jax.style_transfer", "content.png", "style.jpg"]
    options = ["--weights", "net.safetensors", "--size", "40", "--steps", "3"]
    subprocess.run([*command, "out.png", *options], cwd=tmp_path, check=True)
    with PIL.Image.open(tmp_path / "out.png") as out, PIL.Image.open(tmp_path / "content.png") as content:
        assert min(out.size) == 40
        # Three steps of Adam move each pixel by at most three times 0.02 standard deviations: 4 of 255.
        expected = IMAGENET.to_image(IMAGENET.uncropped(content, 40))
        difference = np.asarray(out, int) - np.asarray(expected, int)
        assert 0 < np.abs(difference).max() <= 5
    process = subprocess.run(
        [*command[:3], "none.png", *command[4:], "x.png", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "none.png: not a readable image" in line
    wrong = ["--size", "8", "--steps", "0", "--style-weight", "nan"]
    process = subprocess.run([*command, "no/x.abc", *options, *wrong], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    parts = ("--size is 8", "--steps is 0", "--style-weight is nan", "'.abc'", "no, where no/x.abc should go")
    for line, part in zip(process.stderr.splitlines(), parts, strict=True):
        assert part in line


@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_the_way_back_gives_the_image(order):
    prepare = Preprocessing(
        mean=(0.3,) if order == "L" else (0.1, 0.2, 0.3),
        std=(0.2,) if order == "L" else (0.2, 0.3, 0.4),
        channel_order=order,
    )
    (image,) = photographs(1)
    image = image.convert("L" if order == "L" else "RGB")
    array = prepare.uncropped(image, min(image.size))
    assert array.shape == (image.height, image.width, len(prepare.mean))
    np.testing.assert_array_equal(prepare.to_image(array), image)
