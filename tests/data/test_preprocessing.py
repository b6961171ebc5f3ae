"""The preprocessing of images equals torchvision's and Keras', and needs only Pillow and NumPy."""

import io
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.cli.test_train import ROOT
from tests.conftest import photographs
from vgg_jax.config import DataConfig
from vgg_jax.data.preprocessing import AUTHORS, CIFAR10, IMAGENET, Preprocessing

WITHOUT_EXTRA = """
import sys
for name in ("tensorflow_datasets", "grain", "array_record", "simplejpeg", "cykooz_resizer", "sklearn"):
    sys.modules[name] = None
import vgg_jax.data.preprocessing
import vgg_jax.data.image_files
print(sorted(name for name in sys.modules if name.startswith("vgg_jax.data.")))
import vgg_jax.data.loader
import vgg_jax.data.prepare.catalog
from vgg_jax.errors import UserError
try:
    vgg_jax.data.dataset.open_split("cifar10", "train", data_dir="/nonexistent")
except UserError as error:
    print(error)
"""


def test_preprocessing_imports_without_the_extra():
    """A call that needs the extra names the missing package and the command that installs it."""
    process = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    modules, error = process.stdout.splitlines()
    assert modules == "['vgg_jax.data.gray_depth', 'vgg_jax.data.image_files', 'vgg_jax.data.preprocessing']"
    assert error == "tensorflow_datasets is not installed: pip install 'vgg_jax[train]'"


def test_cifar10_preprocessing_equals_the_default_data():
    data = DataConfig()
    assert (CIFAR10.resize, CIFAR10.crop) == (data.resize, data.image_size) == (32, 32)
    assert (CIFAR10.mean, CIFAR10.std) == (data.mean, data.std)
    array = CIFAR10(photographs(1)[0])
    assert (array.shape, array.dtype) == ((32, 32, 3), np.float32)


def test_imagenet_preprocessing_is_torchvisions(torchvision):
    reference = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    for image in photographs(12):
        ours = IMAGENET(image)
        assert (ours.shape, ours.dtype) == ((224, 224, 3), np.float32)
        expected = reference(image).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding
        pixels = np.round((expected * IMAGENET.std + IMAGENET.mean) * 255).astype(np.uint8)
        np.testing.assert_array_equal(IMAGENET.view(image), pixels)


def test_authors_preprocessing_is_keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    (image,) = photographs(1)
    pixels = AUTHORS.view(image)[..., ::-1].astype(np.float32)
    expected = keras.applications.vgg16.preprocess_input(pixels)
    np.testing.assert_allclose(AUTHORS(image), expected, atol=2e-4)  # float32 rounding of numbers up to 150


def test_all_image_modes_give_the_same_view():
    gray = np.linspace(0, 255, 300 * 260).reshape(260, 300).astype(np.uint8)
    image = PIL.Image.fromarray(gray)
    expected = IMAGENET.view(image.convert("RGB"))
    sixteen = PIL.Image.fromarray(gray.astype(np.uint16) * 257)
    for other in (image, sixteen, image.convert("LA"), image.convert("RGBA"), image.convert("CMYK")):
        np.testing.assert_array_equal(IMAGENET.view(other), expected, err_msg=other.mode)
    rotated = image.transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to show
    file = io.BytesIO()
    rotated.convert("RGB").save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(IMAGENET.view(PIL.Image.open(file)), expected)


@pytest.mark.parametrize("order", ["RGB", "BGR", "L"])
def test_to_image_inverts_the_preprocessing(order):
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
