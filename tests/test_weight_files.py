"""Files of weights in and out, and the preprocessing that belongs to them."""

import collections
import io
import os
import zipfile

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

from tests.conftest import photographs, raises_user_error, relative_error
from tests.test_weights import assert_equal_trees, variables_of
from vgg_jax import VGG, load, save, to_torch
from vgg_jax.convert import convert
from vgg_jax.preprocess import AUTHORS, FEATURES, IMAGENET, Preprocessing
from vgg_jax.pretrained import load_for_images
from vgg_jax.weight_files import load_with_preprocessing

SMALL = dict(depth=11, num_classes=3, pool_size=1, hidden=(8, 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_round_trip_bit_for_bit(suffix, dtype, tmp_path):
    model = VGG(**SMALL, batch_norm=True, param_dtype=dtype)
    variables = variables_of(model)
    path = tmp_path / f"weights{suffix}"
    save(path, model, variables, FEATURES)
    read, back, preprocessing = load_with_preprocessing(path)
    assert_equal_trees(back, variables)
    for field in ("depth", "batch_norm", "num_classes", "hidden", "pool_size", "dtype", "param_dtype"):
        assert getattr(read, field) == getattr(model, field), field
    assert preprocessing == (FEATURES if suffix == ".safetensors" else IMAGENET)
    assert os.listdir(tmp_path) == [path.name]


def test_safetensors_keep_what_names_do_not_say(tmp_path):
    model = VGG(11, num_classes=3, pool_size=1, hidden=(), pool_after=(1, 3), dropout_rate=0.25, remat=True)
    variables = variables_of(model)
    save(tmp_path / "w.safetensors", model, variables)
    read, back = load(tmp_path / "w.safetensors")
    assert read == model
    assert_equal_trees(back, variables)


def timm_names(state_dict):
    """timm's names and shapes for torchvision's."""
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    renamed = {}
    for name, array in state_dict.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "weight" and module in ("classifier.0", "classifier.3"):
            size = 7 if module == "classifier.0" else 1
            array = array.reshape(len(array), -1, size, size)
        renamed[f"{names.get(module, module)}.{leaf}"] = array
    return renamed


def test_timm_and_module_prefix_and_foreign_safetensors(tmp_path):
    from safetensors.numpy import save_file

    model = VGG(11, batch_norm=True, num_classes=4, hidden=(16, 12))
    variables = variables_of(model)
    state_dict = to_torch(model, variables)
    timm = timm_names(state_dict)
    assert timm["pre_logits.fc1.weight"].shape == (16, 512, 7, 7)
    save_file(timm, tmp_path / "timm.safetensors")
    read, back = load(tmp_path / "timm.safetensors")
    assert_equal_trees(back, variables)
    assert_equal_trees(to_torch(read, back), state_dict)
    torch.save({"state_dict": {f"module.{k}": torch.from_numpy(a) for k, a in state_dict.items()}}, tmp_path / "m.pth")
    assert_equal_trees(load(tmp_path / "m.pth")[1], variables)


def test_files_of_old_pytorch_are_read(tmp_path):
    """torchvision's VGG files of 2016 are not zip archives."""
    model = VGG(**SMALL)
    variables = variables_of(model)
    tensors = collections.OrderedDict((k, torch.from_numpy(a)) for k, a in to_torch(model, variables).items())
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert_equal_trees(load(tmp_path / "old.pth")[1], variables)


def test_features_only(tmp_path):
    """A file without a classifier, or with one of NaN as torchvision's IMAGENET1K_FEATURES, has no head."""
    model = VGG(16, num_classes=10, pool_size=1, hidden=())
    variables = variables_of(model)
    tensors = {k: torch.from_numpy(a) for k, a in to_torch(model, variables).items()}
    for name in ("classifier.0.weight", "classifier.0.bias"):
        tensors[name] = torch.full_like(tensors[name], np.nan)
    torch.save(tensors, tmp_path / "nan.pth")
    torch.save({k: a for k, a in tensors.items() if k.startswith("features")}, tmp_path / "bare.pth")
    del variables["params"]["fc8"]
    for name, expected in (("nan.pth", FEATURES), ("bare.pth", IMAGENET)):
        read, back, preprocessing = load_with_preprocessing(tmp_path / name)
        assert (read.num_classes, read.hidden, preprocessing) == (None, (), expected)
        assert_equal_trees(back, variables)


# --- Keras


@pytest.fixture(scope="module")
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    return keras


def published_layout(network, path):
    """The layout of Keras' published files: one group a layer, arrays named block1_conv1_W_1:0."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in network.layers]
        for layer in network.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}_{part}_1:0" for part in "Wb"] if layer.weights else []
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.get_weights(), strict=True):
                group[name] = weight


@pytest.mark.parametrize("layout", ["published", "keras3"])
@pytest.mark.parametrize("depth", [16, pytest.param(19, marks=pytest.mark.grid)])
def test_keras_files_give_keras_logits(depth, layout, keras, tmp_path):
    keras.utils.set_random_seed(0)
    make = keras.applications.VGG16 if depth == 16 else keras.applications.VGG19
    network = make(weights=None, classes=1000, classifier_activation=None)
    path = tmp_path / "weights.h5"
    if layout == "published":
        published_layout(network, path)
    else:
        network.save(path)
    model, variables, preprocessing = load_with_preprocessing(path)
    assert (model.depth, model.num_classes, preprocessing) == (depth, 1000, AUTHORS)

    raw = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    expected = np.asarray(network(keras.applications.vgg16.preprocess_input(raw.astype(np.float32))))
    exact = Preprocessing(224, 224, AUTHORS.mean, AUTHORS.std, AUTHORS.channel_order)  # the images as they are
    ours = np.stack([exact(PIL.Image.fromarray(image)) for image in raw])
    assert relative_error(jax.jit(model.apply)(variables, ours), expected) < 1e-5


def test_keras_features_only_and_other_networks(keras, tmp_path):
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    published_layout(network, tmp_path / "notop.h5")
    model, variables = load(tmp_path / "notop.h5")
    assert (model.depth, model.num_classes, model.hidden) == (16, None, ())
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    maps = model.clone(pool_size=1).apply(variables, x)
    np.testing.assert_allclose(maps, np.asarray(network(x)).reshape(1, -1), rtol=1e-4, atol=1e-6)  # float32

    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    published_layout(other, tmp_path / "other.h5")
    with raises_user_error("other.h5", "found layers ['dense']", "block1_conv1"):
        load(tmp_path / "other.h5")


# --- preprocessing


def test_preprocessing_is_torchvisions(torchvision):
    reference = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    for image in photographs(12):
        ours = IMAGENET(image)
        assert (ours.shape, ours.dtype) == ((224, 224, 3), np.float32)
        expected = reference(image).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding
        pixels = np.round((expected * IMAGENET.std + IMAGENET.mean) * 255).astype(np.uint8)
        np.testing.assert_array_equal(IMAGENET.view(image), pixels)


def test_authors_preprocessing_is_keras(keras):
    (image,) = photographs(1)
    pixels = AUTHORS.view(image)[..., ::-1].astype(np.float32)
    expected = keras.applications.vgg16.preprocess_input(pixels)
    np.testing.assert_allclose(AUTHORS(image), expected, atol=2e-4)  # float32 rounding of numbers up to 150


def test_images_of_every_mode():
    grey = np.linspace(0, 255, 300 * 260).reshape(260, 300).astype(np.uint8)
    image = PIL.Image.fromarray(grey)
    expected = IMAGENET.view(image.convert("RGB"))
    sixteen = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    for other in (image, sixteen, image.convert("LA"), image.convert("RGBA"), image.convert("CMYK")):
        np.testing.assert_array_equal(IMAGENET.view(other), expected, err_msg=other.mode)
    rotated = image.transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to show
    file = io.BytesIO()
    rotated.convert("RGB").save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(IMAGENET.view(PIL.Image.open(file)), expected)


# --- convert


def test_a_pth_file_cannot_say_what_its_images_want(tmp_path, torchvision, capsys):
    model = VGG(**SMALL)
    own = Preprocessing(32, 32, (0.5,), (0.25,), "L")
    save(tmp_path / "a.safetensors", model, variables_of(model, channels=1), own)
    with raises_user_error("missing, where b.pth should go, is no folder"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "missing" / "b.pth"), check=False)
    assert convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), check=False) == 0
    assert "note: a .pth file cannot say that its images want Preprocessing(resize=32" in capsys.readouterr().out
    assert load_for_images(str(tmp_path / "a.safetensors"))[2] == own
    with raises_user_error("b.pth takes images of 1 channel(s), and does not say how to prepare them"):
        load_for_images(str(tmp_path / "b.pth"))
    with raises_user_error("another head, column, pools or channels"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth"), check=True)


def test_convert_and_check_against_torchvision(tmp_path, torchvision, capsys):
    torch.manual_seed(0)
    net = torchvision.models.vgg11_bn(weights=None, num_classes=6, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert convert(str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), check=True) == 0
    output = capsys.readouterr().out
    assert "VGG-11 with batch norm, 6 classes" in output
    assert "relative error" in output
    assert convert(str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth"), check=False) == 0
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(back[name], tensor), name
    with raises_user_error("is the source itself"):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "a.pth"), check=False)
    with raises_user_error("nowhere.pth does not exist"):
        convert(str(tmp_path / "nowhere.pth"), str(tmp_path / "a.pth"), check=False)
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["features.0.bias"], back["features.0.bias"])
