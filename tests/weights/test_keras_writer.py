"""Files that we write for Keras: the names and shapes of Keras' own, and its answers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import raises_user_error, random_variables, relative_error
from tests.export.pages import run_page
from tests.weights.keras_networks import authors, dense, keras_output, raw_images
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import AUTHORS, IMAGENET, VGG, Network, load


def network(preprocessing=AUTHORS, classes=None, **fields):
    model = VGG(**dict(depth=16) | fields)
    side = preprocessing.crop
    return Network(model, random_variables(model, side, side, 3), preprocessing, classes)


def listing(path):
    """Return the attributes of each group and the shape and dtype of each array of a file, but for our metadata."""
    import h5py

    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: (dict(item.attrs), getattr(item, "shape", None))}))
    found.pop("vgg_jax", None)
    return found


@pytest.mark.parametrize("top", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_narrow_file_is_read_by_keras(top, keras, trunk, tmp_path):
    """The Keras network has the layers and names of keras.applications.VGG16, and an eighth of the channels."""
    keras.backend.clear_session()
    theirs = dense(keras, trunk(64), (24, 16, 5), name="predictions") if top else trunk(64)
    net = network(authors(64), pool_size=2, hidden=(24, 16) if top else (), num_classes=5 if top else None)
    net.save(tmp_path / "net.weights.h5")
    theirs.load_weights(tmp_path / "net.weights.h5")
    images = raw_images(64)
    ours = net(np.stack([net.preprocess(image) for image in images]))
    if top:
        ours = np.exp(ours) / np.exp(ours).sum(-1, keepdims=True)
    assert relative_error(ours, keras_output(keras, theirs, images).reshape(2, -1)) < 1e-5


def test_names_and_shapes_are_those_that_keras_writes(keras, trunk, tmp_path, capsys):
    keras.backend.clear_session()
    trunk(32).save_weights(tmp_path / "theirs.weights.h5")
    network(authors(32), hidden=(), num_classes=None).save(tmp_path / "ours.weights.h5")
    assert not capsys.readouterr().err
    assert listing(tmp_path / "ours.weights.h5") == listing(tmp_path / "theirs.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [16, 19])
def test_names_are_those_of_keras_applications(depth, keras, tmp_path):
    keras.backend.clear_session()
    theirs = getattr(keras.applications, f"VGG{depth}")(weights=None, include_top=False, input_shape=(32, 32, 3))
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    network(authors(32), depth=depth, hidden=(), num_classes=None).save(tmp_path / "ours.weights.h5")
    assert listing(tmp_path / "ours.weights.h5") == listing(tmp_path / "theirs.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top"), [("VGG16", True), ("VGG16", False), ("VGG19", True), ("VGG19", False)])
def test_full_file_is_read_by_keras_applications(name, top, keras, tmp_path):
    keras.backend.clear_session()
    fields = dict() if top else dict(hidden=(), num_classes=None)
    net = network(authors(224), depth=int(name[3:]), **fields)
    net.save(tmp_path / "net.weights.h5")
    make = getattr(keras.applications, name)
    theirs = make(weights=str(tmp_path / "net.weights.h5"), include_top=top, input_shape=(224, 224, 3))
    if top:
        theirs.layers[-1].activation = keras.activations.linear
        theirs.save_weights(tmp_path / "theirs.weights.h5")
        assert listing(tmp_path / "net.weights.h5") == listing(tmp_path / "theirs.weights.h5")
    images = raw_images(224)
    ours = net(np.stack([net.preprocess(image) for image in images]))
    assert relative_error(ours, keras_output(keras, theirs, images).reshape(2, -1)) < 1e-5


def test_saved_file_is_loaded_unchanged(narrow, tmp_path, capsys):
    """Without what we state in it, a file with Keras' names would be taken for the authors' weights."""
    net = network(IMAGENET, tuple(map(str, range(1000))), hidden=(16, 24), dropout_rate=0.25)
    net = dataclasses.replace(net, outputs="sigmoid")
    net.save(tmp_path / "net.weights.h5")
    assert "preprocess_input is not the preprocessing of this network" in capsys.readouterr().err
    back = load(tmp_path / "net.weights.h5")
    for name in ("model", "preprocessing", "classes", "outputs"):
        assert getattr(back, name) == getattr(net, name), name
    assert_equal_trees(back.variables, net.variables)
    assert not capsys.readouterr().err
    assert load(tmp_path / "net.weights.h5", features_only=True).model.num_classes is None


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (dict(depth=11), "depth 11 (column A)"),
        (dict(conv1x1=True), "depth 16 (column C)"),
        (dict(batch_norm=True), "batch norm"),
        (dict(hidden=()), "a head with hidden=()"),
        (dict(num_classes=None, hidden=(8, 8)), "a head with hidden=(8, 8)"),
    ],
    ids=["A", "C", "bn", "one layer", "no classes"],
)
def test_network_that_keras_has_not_is_refused(fields, what, narrow, tmp_path):
    with raises_user_error(
        f"keras.applications has no VGG with {what}; expected VGG-16 or VGG-19", "save .safetensors"
    ):
        network(**dict(hidden=(8, 8)) | fields).save(tmp_path / "net.weights.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net.h5", "net.keras", "net.hdf5"])
def test_only_weights_h5_is_written(name, narrow, tmp_path):
    with raises_user_error("expected .pth, .pt, .safetensors, .weights.h5, .stablehlo or .onnx"):
        network(hidden=(8, 8)).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_keras_page_runs(keras, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = network(authors(224))
    net.save("vgg16.safetensors")
    keras.backend.clear_session()
    model = run_page("keras.md")["model"]
    images = raw_images(224)
    # By the network as it is: the optimized one differs by 1.3e-5, as the exponential enlarges the error of logits.
    inputs = np.stack([net.preprocess(image) for image in images])
    ours = np.exp(jax.jit(net.model.apply)(net.variables, inputs))
    assert relative_error(ours / ours.sum(-1, keepdims=True), keras_output(keras, model, images)) < 1e-5
