"""Files of Keras with old or unusual layouts and names are read, and hostile files are refused."""

import json
import re
import resource
import time
import zipfile

import h5py
import jax
import numpy as np
import pytest

from tests.conftest import raises_user_error, relative_error
from tests.weights.keras_networks import (
    SUFFIXES,
    authors,
    dense,
    keras_output,
    raw_images,
    save,
)
from tests.weights.test_formats import published_layout
from vgg_jax import load
from vgg_jax.weights.formats import load_file


def write_legacy(path, weights, attributes=None):
    """Write a file of weights as Keras 1 and 2 do: `weights` maps layers to names and arrays."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in weights]
        file.attrs.update(attributes or {})
        for layer, arrays in weights.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in arrays]
            for name, array in arrays.items():
                group[name] = array


def legacy_weights(network, rename=lambda name: name):
    return {
        rename(layer.name): {
            f"{rename(layer.name)}/{part}:0": array
            for part, array in zip(("kernel", "bias"), layer.get_weights(), strict=False)
        }
        for layer in network.layers
    }


def vggface(name):
    block = re.fullmatch(r"block(\d)_conv(\d)", name)
    dense_names = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}
    return f"conv{block[1]}_{block[2]}" if block else dense_names.get(name, name)


@pytest.mark.parametrize("rename", [vggface, lambda name: f"{name}_1"], ids=["vggface", "suffix"])
def test_other_names_of_legacy_files_are_read(rename, keras, trunk, tmp_path):
    network = dense(keras, trunk(64), (24, 16, 5), name="predictions")
    write_legacy(tmp_path / "old.h5", legacy_weights(network, rename))
    net = load(tmp_path / "old.h5", preprocessing=authors(64))
    images = raw_images(64)
    found = jax.nn.softmax(net(np.stack([net.preprocess(image) for image in images])))
    assert relative_error(found, keras_output(keras, network, images)) < 1e-5
    assert (net.model.hidden, net.model.num_classes) == ((24, 16), 5)
    write_legacy(tmp_path / "notop.h5", legacy_weights(trunk(64), rename))
    assert load(tmp_path / "notop.h5").model.num_classes is None


def test_theano_files_are_converted_or_refused(keras, trunk, tmp_path):
    """Keras 2 states the backend whose kernels are flipped. Keras 1 does not, and puts channels first."""
    base = trunk(32)
    weights = legacy_weights(base)
    flipped = {k: {n: a[::-1, ::-1] if a.ndim == 4 else a for n, a in v.items()} for k, v in weights.items()}
    write_legacy(tmp_path / "theano.h5", flipped, dict(backend=b"theano", keras_version=b"2.2.4"))
    kernel = load(tmp_path / "theano.h5").variables["params"]["conv1_1"]["kernel"]
    np.testing.assert_array_equal(kernel, base.get_layer("block1_conv1").get_weights()[0])

    first = {k: {n: a.transpose(3, 2, 0, 1) if a.ndim == 4 else a for n, a in v.items()} for k, v in weights.items()}
    write_legacy(tmp_path / "first.h5", first)
    with raises_user_error("block1_conv1 has a kernel of shape (8, 3, 3, 3)", "tf_dim_ordering_tf_kernels.h5"):
        load(tmp_path / "first.h5")
    write_legacy(tmp_path / "vgg16_tf_dim_ordering_th_kernels.h5", weights)
    with raises_user_error("Theano flipped the kernels"):
        load(tmp_path / "vgg16_tf_dim_ordering_th_kernels.h5")


def test_weights_without_names_of_layers_are_read(keras, trunk, tmp_path):
    """Older versions of Keras 3 do not state the names; groups are called after classes."""
    network = dense(keras, trunk(64), (24, 16, 5))
    path = save(network, tmp_path / "net.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "bare.weights.h5").write_bytes(members["model.weights.h5"])
    with h5py.File(tmp_path / "bare.weights.h5", "r+") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    members["model.weights.h5"] = (tmp_path / "bare.weights.h5").read_bytes()
    with zipfile.ZipFile(tmp_path / "bare.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    expected = load(path)
    for name in ("bare.keras", "bare.weights.h5"):
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / name).variables, expected.variables)


def test_content_decides_the_format_of_keras_files(keras, trunk, tmp_path):
    base = trunk(32)
    for suffix in SUFFIXES:
        for other in (".bin", ".hdf5", ".HDF5", ".ckpt"):
            path = save(base, tmp_path / f"net{suffix}").rename(tmp_path / f"as{suffix.replace('.', '_')}{other}")
            assert load(path).model.depth == 16
    published_layout(base, tmp_path / "net.hdf5")
    assert load(tmp_path / "net.hdf5").model.depth == 16


def test_nonfinite_keras_weights_are_refused(keras, trunk, tmp_path):
    base = trunk(32)
    layer = base.get_layer("block3_conv2")
    layer.set_weights([np.full_like(array, np.nan) for array in layer.get_weights()])
    with raises_user_error("holds numbers that are not finite, in block3_conv2"):
        load(save(base, tmp_path / "nan.keras"))


def hostile_h5(path, kind):
    with h5py.File(path, "w") as file:
        vars_ = file.create_group("layers/conv2d/vars")
        vars_["1"] = np.zeros(64, np.float32)
        if kind == "shape":
            vars_.create_dataset("0", (2**20, 2**20, 64, 64), np.float32, chunks=(2, 2, 64, 64))
        elif kind == "contiguous":
            vars_.create_dataset("0", (2**16, 2**16), np.float32)
        elif kind == "compressed":
            vars_.create_dataset("0", data=np.zeros((2**12, 2**12), np.float32), compression="gzip")
        elif kind == "external link":
            vars_["0"] = h5py.ExternalLink("other.h5", "secret")
        elif kind == "external file":
            vars_.create_dataset("0", (3, 3, 3, 64), np.float32, external=[("secret.bin", 0, h5py.h5f.UNLIMITED)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 3, 3, 64), np.float32)
            layout[:] = h5py.VirtualSource("other.h5", "secret", (3, 3, 3, 64))
            vars_.create_virtual_dataset("0", layout)
        elif kind == "cycle":
            for i in range(30):
                file["layers"][f"d{i}"] = file["layers"]
        elif kind == "linked root":
            file["model_weights"] = h5py.ExternalLink("other.h5", "/")
        elif kind == "strings":
            vars_["0"] = np.array([b"x" * 100])


@pytest.mark.parametrize(
    "kind",
    [
        *("shape", "contiguous", "compressed", "external link", "external file", "virtual", "cycle", "linked root"),
        *("strings", "bomb", "deep", "not a model", "config"),
    ],
)
def test_hostile_keras_files_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File("other.h5", "w") as file:
        file["secret"] = np.zeros((3, 3, 3, 64), np.float32)
    (tmp_path / "secret.bin").write_bytes(bytes(3 * 3 * 3 * 64 * 4))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path = tmp_path / "hostile.h5"
    if kind in ("bomb", "deep", "not a model", "config"):
        config = {
            "deep": "[" * 200_000 + "]" * 200_000,
            "not a model": json.dumps({"class_name": "Custom>Net", "config": {}}),
            "config": json.dumps({"class_name": "Sequential", "config": {"layers": [3, {"class_name": []}]}}),
        }.get(kind, "{}")
        h5py.File("empty.h5", "w").close()
        compression = zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("config.json", config)
            if kind == "bomb":
                with archive.open("model.weights.h5", "w", force_zip64=True) as member:
                    for _ in range(64):
                        member.write(bytes(2**24))
            else:
                archive.write("empty.h5", "model.weights.h5")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    else:
        hostile_h5(path, kind)
    claims = ("shape", "contiguous", "compressed", "external file", "virtual")
    messages = dict.fromkeys(claims, "; expected uncompressed arrays in the file itself") | {
        "external link": "holds no array '0', or a link",
        "linked root": "holds a link 'model_weights'",
        "cycle": "holds more than 20,000 groups",
        "strings": "expected floats",
        "bomb": "an archive whose members are compressed",
    }
    with raises_user_error("hostile.h5: ", messages.get(kind, "")):
        load_file(path)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes: one gigabyte
