"""Pretrained networks by name, from files that the tests write."""

import hashlib
import os
import time

import jax
import numpy as np

from tests.conftest import raises_user_error
from tests.weights.test_formats import published_layout
from tests.weights.test_layouts import assert_equal_trees, variables_of
from vgg_jax import VGG, load
from vgg_jax.data.preprocessing import AUTHORS, IMAGENET
from vgg_jax.errors import UserError
from vgg_jax.weights import download
from vgg_jax.weights.download import load_pretrained
from vgg_jax.weights.formats import Loaded, save_file


def test_file_from_the_hub_is_checked(tmp_path, monkeypatch):
    """The cache of the hub names a large file by its SHA-256."""
    import huggingface_hub

    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    model = VGG(11, num_classes=3, hidden=(8, 8))
    variables = variables_of(model)
    save_file(tmp_path / "model.safetensors", Loaded(model, variables))
    content = (tmp_path / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    link = tmp_path / "snapshot.safetensors"
    link.symlink_to(blob)
    asked = []

    def fetch(repo_id, filename, **options):
        asked.append((repo_id, filename))
        return str(link)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert_equal_trees(load_pretrained("vgg11_bn").variables, variables)
    assert asked == [("timm/vgg11_bn.tv_in1k", "model.safetensors")]
    assert load_pretrained("vgg11_bn").preprocessing == IMAGENET

    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with raises_user_error("has sha256", f"expected {blob.name}"):
        load_pretrained("vgg11_bn")


def test_offline_error_names_the_url_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    import huggingface_hub

    def unreachable(**options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    placed = tmp_path / "vgg16.safetensors"
    with raises_user_error(str(placed), "https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors"):
        load_pretrained("vgg16")
    model = VGG(11, num_classes=3, pool_size=1, hidden=())
    variables = variables_of(model)
    save_file(placed, Loaded(model, variables))
    assert_equal_trees(load_pretrained("vgg16").variables, variables)

    monkeypatch.setattr("vgg_jax.weights.download.KERAS_URL", "file:///nowhere/{net}.h5")
    with raises_user_error("file:///nowhere/vgg19.h5", str(tmp_path / "vgg19_caffe.h5")):
        load_pretrained("vgg19_caffe")


def test_authors_weights_are_downloaded_once_and_checked(narrow_applications, tmp_path, monkeypatch):
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    network = narrow_applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    published_layout(network, tmp_path / "vgg16.h5")
    monkeypatch.setattr("vgg_jax.weights.download.KERAS_URL", f"file://{tmp_path}/{{net}}.h5")
    with raises_user_error("has md5", "expected 64373286793e3c8b2b4e3219cbf3544b"):
        load_pretrained("vgg16_caffe")
    assert os.listdir(tmp_path / "cache") == []
    with monkeypatch.context() as patch:
        patch.setattr(download, "_check", lambda *_: os.stat(tmp_path / "missing"))
        with raises_user_error("vgg16_caffe is not cached, and cannot be downloaded"):
            load_pretrained("vgg16_caffe")
    assert os.listdir(tmp_path / "cache") == []
    md5 = hashlib.md5((tmp_path / "vgg16.h5").read_bytes()).hexdigest()
    monkeypatch.setitem(download.AUTHORS_MD5, "vgg16_caffe", md5)
    model, variables, preprocessing, *_ = load_pretrained("vgg16_caffe")
    assert model.depth == 16
    np.testing.assert_array_equal(
        variables["params"]["conv1_1"]["kernel"], network.get_layer("block1_conv1").get_weights()[0]
    )
    (tmp_path / "vgg16.h5").unlink()
    load_pretrained("vgg16_caffe")
    assert os.listdir(tmp_path / "cache") == ["vgg16_caffe.h5"]
    assert preprocessing == AUTHORS


def test_convolutional_part_is_cut_once_and_cached(tmp_path, monkeypatch, narrow):
    """The second time, the whole file is not needed: it may be gone."""
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    model = VGG(16, num_classes=3, hidden=(128, 128))
    variables = variables_of(model)
    placed = tmp_path / "vgg16.safetensors"
    save_file(placed, Loaded(model, variables))
    size = placed.stat().st_size
    features = {"params": {name: leaves for name, leaves in variables["params"].items() if "conv" in name}}
    assert_equal_trees(load("vgg16", features_only=True).variables, features)
    placed.unlink()
    (cut,) = tmp_path.iterdir()
    assert cut.stat().st_size < size / 2
    assert cut.name == f"vgg16_features-{hashlib.sha256(cut.read_bytes()).hexdigest()}.safetensors"
    announced = []
    net = load("vgg16", features_only=True, announce=announced.append)
    assert_equal_trees(net.variables, features)
    assert (net.model, net.preprocessing, net.classes) == (VGG(16, num_classes=None, hidden=()), IMAGENET, None)
    assert [net.model for net in announced] == [net.model]

    content = cut.read_bytes()
    cut.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with raises_user_error("has sha256", "delete the file"):
        load("vgg16", features_only=True)


def test_newer_whole_file_replaces_the_cut_one(tmp_path, monkeypatch, narrow):
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    model = VGG(11, num_classes=None, hidden=())
    placed = tmp_path / "vgg11.safetensors"
    for factor in (1, 2):
        variables = jax.tree.map(lambda x: x * factor, variables_of(model))  # noqa: B023 - called at once
        save_file(placed, Loaded(model, variables))
        later = time.time() + 10 * factor  # the resolution of the file system's clock may be coarse
        os.utime(placed, (later, later))
        assert_equal_trees(load("vgg11", features_only=True).variables, variables)


def test_features_load_without_a_writable_cache(tmp_path, monkeypatch, narrow, capsys):
    """A note says that they are not cached."""
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    model = VGG(11, num_classes=3, hidden=(8, 8))
    variables = variables_of(model)
    save_file(tmp_path / "vgg11.safetensors", Loaded(model, variables))

    def full(path, network):
        raise UserError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr(download, "save_file", full)
    assert "fc6" not in load("vgg11", features_only=True).variables["params"]
    assert "the convolutional part is not cached for later calls: cannot write" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["vgg11.safetensors"]


def test_unknown_name_lists_the_known_ones():
    with raises_user_error("'vgg12'", "vgg11, vgg11_bn, vgg13", "vgg19_caffe"):
        load_pretrained("vgg12")
