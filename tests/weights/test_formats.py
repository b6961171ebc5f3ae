"""Files of weights: each format is read and written without loss."""

import collections
import os
import sys
import zipfile

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

from tests.conftest import raises_user_error, relative_error
from tests.weights.test_layouts import assert_equal_trees, variables_of
from vgg_jax import VGG, from_torch, to_torch
from vgg_jax.data.preprocessing import AUTHORS, CIFAR10, FEATURES, Preprocessing
from vgg_jax.weights.formats import Loaded, load_file, save_file

SMALL = dict(depth=11, num_classes=3, pool_size=1, hidden=(8, 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_round_trip_bit_for_bit(suffix, dtype, tmp_path):
    model = VGG(**SMALL, batch_norm=True, param_dtype=dtype)
    variables = variables_of(model)
    path = tmp_path / f"weights{suffix}"
    save_file(path, Loaded(model, variables, FEATURES))
    read, back, preprocessing, *_ = load_file(path)
    assert_equal_trees(back, variables)
    for field in ("depth", "batch_norm", "num_classes", "hidden", "pool_size", "dtype", "param_dtype"):
        assert getattr(read, field) == getattr(model, field), field
    assert preprocessing == FEATURES
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_hold_everything_that_a_network_carries(suffix, tmp_path):
    model = VGG(11, num_classes=3, pool_size=1, hidden=(), pool_after=(1, 3), dropout_rate=0.25, remat=True)
    variables = variables_of(model)
    path = tmp_path / f"w{suffix}"
    for carried in (
        (AUTHORS, ("café", "a cat", "10"), "sigmoid"),
        (None, None, None),  # is not known, and stays so
    ):
        save_file(path, Loaded(model, variables, *carried))
        read = load_file(path)
        assert read.model == model
        assert_equal_trees(read.variables, variables)
        assert (read.preprocessing, read.classes, read.outputs, read.notes) == (*carried, ())


@pytest.mark.usefixtures("narrow")
def test_torchvision_loads_our_pth_with_all_it_carries(torchvision, tmp_path):
    """torch.load executes nothing in the file, and load_state_dict is strict."""
    widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    net = torchvision.models.VGG(torchvision.models.vgg.make_layers(widths, batch_norm=True), init_weights=False)
    relu, dropout = torch.nn.ReLU(), torch.nn.Dropout()
    dense = [torch.nn.Linear(*shape) for shape in ((64, 8), (8, 8), (8, 2))]
    net.classifier = torch.nn.Sequential(dense[0], relu, dropout, dense[1], relu, dropout, dense[2])
    model, variables = from_torch(net.state_dict())
    save_file(tmp_path / "w.pth", Loaded(model, variables, CIFAR10, ("cat", "dog"), "softmax"))
    tensors = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(tensors) == list(net.state_dict())
    assert str(net.load_state_dict(tensors, strict=True)) == "<All keys matched successfully>"
    torch.save(dict(tensors), tmp_path / "plain.pth")  # the plain dict has lost what the file stated
    assert load_file(tmp_path / "plain.pth").classes is None


def test_pth_with_a_replaced_last_layer_is_read_off_its_tensors(tmp_path):
    model = VGG(**SMALL)
    save_file(tmp_path / "w.pth", Loaded(model, variables_of(model), AUTHORS, ("cat", "dog", "emu")))
    tensors = torch.load(tmp_path / "w.pth", weights_only=True)
    tensors |= {"classifier.6.weight": torch.ones(5, 8), "classifier.6.bias": torch.ones(5)}
    torch.save(tensors, tmp_path / "w.pth")
    loaded = load_file(tmp_path / "w.pth")
    assert (loaded.model.num_classes, loaded.classes) == (5, None)
    assert "the network that vgg_jax described in the file is another one" in loaded.notes[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_metadata_that_do_not_fit_are_refused(suffix, tmp_path):
    model = VGG(**SMALL)
    variables = variables_of(model)
    for classes, outputs, line in (
        (("cat", "dog"), "softmax", "class names that do not fit the network's 3 classes"),
        (None, "argmax", "state outputs 'argmax'; expected one of softmax, sigmoid, values"),
    ):
        save_file(tmp_path / f"w{suffix}", Loaded(model, variables, None, classes, outputs))
        with raises_user_error(f"w{suffix}: its metadata", line):
            load_file(tmp_path / f"w{suffix}")


def timm_names(state_dict):
    """Return a state dict of torchvision with timm's names and shapes."""
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    renamed = {}
    for name, array in state_dict.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "weight" and module in ("classifier.0", "classifier.3"):
            size = 7 if module == "classifier.0" else 1
            array = array.reshape(len(array), -1, size, size)
        renamed[f"{names.get(module, module)}.{leaf}"] = array
    return renamed


def test_timm_files_are_read(tmp_path):
    from safetensors.numpy import save_file as save_arrays

    model = VGG(11, batch_norm=True, num_classes=4, hidden=(16, 12))
    variables = variables_of(model)
    state_dict = to_torch(model, variables)
    timm = timm_names(state_dict)
    assert timm["pre_logits.fc1.weight"].shape == (16, 512, 7, 7)
    save_arrays(timm, tmp_path / "timm.safetensors")
    read, back, *_ = load_file(tmp_path / "timm.safetensors")
    assert_equal_trees(back, variables)
    assert read.conv_head
    assert_equal_trees(to_torch(read, back), timm)


def test_wrapper_and_module_prefix_are_removed(tmp_path):
    model = VGG(11, batch_norm=True, num_classes=4, hidden=(16, 12))
    variables = variables_of(model)
    tensors = {f"module.{k}": torch.from_numpy(a) for k, a in to_torch(model, variables).items()}
    torch.save({"state_dict": tensors}, tmp_path / "m.pth")
    assert_equal_trees(load_file(tmp_path / "m.pth").variables, variables)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_content_decides_the_format(suffix, tmp_path):
    """The Hugging Face hub has state dicts of PyTorch that are called pytorch_model.bin."""
    model = VGG(**SMALL)
    variables = variables_of(model)
    save_file(tmp_path / f"weights{suffix}", Loaded(model, variables))
    for name in ("pytorch_model.bin", "weights.h5"):
        (tmp_path / f"weights{suffix}").rename(tmp_path / name)
        assert_equal_trees(load_file(tmp_path / name).variables, variables)
        (tmp_path / name).rename(tmp_path / f"weights{suffix}")


def test_legacy_pth_files_are_read(tmp_path):
    """torchvision's VGG files of 2016 are not zip archives."""
    model = VGG(**SMALL)
    variables = variables_of(model)
    tensors = collections.OrderedDict((k, torch.from_numpy(a)) for k, a in to_torch(model, variables).items())
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert_equal_trees(load_file(tmp_path / "old.pth").variables, variables)


def test_empty_or_missing_classifier_gives_no_head(tmp_path):
    """A file without a classifier, or with one of NaN as torchvision's IMAGENET1K_FEATURES, has no head."""
    model = VGG(16, num_classes=10, pool_size=1, hidden=())
    variables = variables_of(model)
    tensors = {k: torch.from_numpy(a) for k, a in to_torch(model, variables).items()}
    for name in ("classifier.0.weight", "classifier.0.bias"):
        tensors[name] = torch.full_like(tensors[name], np.nan)
    torch.save(tensors, tmp_path / "nan.pth")
    torch.save({k: a for k, a in tensors.items() if k.startswith("features")}, tmp_path / "bare.pth")
    del variables["params"]["fc8"]
    for name, expected in (("nan.pth", FEATURES), ("bare.pth", None)):
        read, back, preprocessing, *_ = load_file(tmp_path / name)
        assert (read.num_classes, read.hidden, preprocessing) == (None, (), expected)
        assert_equal_trees(back, variables)


# --- Keras


def published_layout(network, path):
    """Write a file as Keras publishes them: one group for each layer, arrays named block1_conv1_W_1:0."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in network.layers]
        for layer in network.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}_{part}_1:0" for part in "Wb"] if layer.weights else []
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.get_weights(), strict=True):
                group[name] = weight


@pytest.mark.parametrize("layout", ["published", pytest.param("keras3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [16, pytest.param(19, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", ["narrow", pytest.param("full", marks=pytest.mark.slow)])
def test_keras_files_give_keras_logits(width, depth, layout, keras, request, tmp_path):
    if width == "narrow":
        request.getfixturevalue("narrow_applications")
    keras.utils.set_random_seed(0)
    make = keras.applications.VGG16 if depth == 16 else keras.applications.VGG19
    network = make(weights=None, classes=1000, classifier_activation=None)
    path = tmp_path / "weights.h5"
    if layout == "published":
        published_layout(network, path)
    else:
        network.save(path)
    model, variables, preprocessing, *_ = load_file(path)
    assert (model.depth, model.num_classes, preprocessing) == (depth, 1000, AUTHORS)

    raw = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    expected = np.asarray(network(keras.applications.vgg16.preprocess_input(raw.astype(np.float32))))
    exact = Preprocessing(224, 224, AUTHORS.mean, AUTHORS.std, AUTHORS.channel_order)  # the images as they are
    ours = np.stack([exact(PIL.Image.fromarray(image)) for image in raw])
    assert relative_error(jax.jit(model.apply)(variables, ours), expected) < 1e-5


def test_keras_file_without_head_is_read(narrow_applications, keras, tmp_path):
    network = narrow_applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    published_layout(network, tmp_path / "notop.h5")
    model, variables, *_ = load_file(tmp_path / "notop.h5")
    assert (model.depth, model.num_classes, model.hidden) == (16, None, ())
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    maps = model.clone(pool_size=1).apply(variables, x)
    np.testing.assert_allclose(maps, np.asarray(network(x)).reshape(1, -1), rtol=1e-4, atol=1e-6)  # float32


def test_other_keras_networks_are_refused(keras, tmp_path):
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    published_layout(other, tmp_path / "other.h5")
    with raises_user_error("other.h5", "found layers ['dense']", "block1_conv1"):
        load_file(tmp_path / "other.h5")


@pytest.mark.parametrize(("module", "extra", "name"), [("torch", "torch", "a.pth"), ("h5py", "keras", "a.h5")])
def test_missing_package_names_its_extra(module, extra, name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(bytes(100))
    monkeypatch.setitem(sys.modules, module, None)
    with raises_user_error(f"{name}: {module} is not installed: pip install 'vgg_jax[{extra}]'"):
        load_file(tmp_path / name)
