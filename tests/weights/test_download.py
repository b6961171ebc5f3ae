"""Pretrained networks by name, from files that the tests write."""

import hashlib
import os

import numpy as np

from tests.conftest import raises_user_error
from tests.weights.test_formats import published_layout
from tests.weights.test_layouts import assert_equal_trees, variables_of
from vgg_jax import VGG
from vgg_jax.data.preprocessing import AUTHORS, IMAGENET
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


def test_authors_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
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


def test_unknown_name_lists_the_known_ones():
    with raises_user_error("'vgg12'", "vgg11, vgg11_bn, vgg13", "vgg19_caffe"):
        load_pretrained("vgg12")
