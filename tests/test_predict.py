"""`python -m vgg_jax.predict`, and pretrained networks by name, from files that the tests write."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, raises_user_error
from tests.test_weight_files import published_layout
from tests.test_weights import assert_equal_trees, variables_of
from vgg_jax import VGG, load_pretrained, preprocessing, save
from vgg_jax.predict import class_names, predict
from vgg_jax.preprocess import AUTHORS, IMAGENET, Preprocessing

MODEL = VGG(11, num_classes=1000, pool_size=1, hidden=())
SMALL_VIEW = Preprocessing(40, 32)  # small images, so that the tests are quick


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    init = jax.jit(MODEL.init)
    save(path, MODEL, init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)), SMALL_VIEW)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """100 images in many formats and modes, of which one is none."""
    images = tmp_path / "images"
    images.mkdir()
    formats = [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("jpg", "CMYK"), ("png", "L"), ("png", "P")]
    for i, image in enumerate(photographs(99)):
        suffix, mode = formats[i % len(formats)]
        image.resize((64, 50)).convert(mode).save(images / f"{i:02d}.{suffix}")
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "notes.txt").write_text("not looked at")
    return images


def test_of_100_images_99_are_answered_and_one_reported(weights, folder):
    results = list(predict(weights, [str(folder)]))
    assert len(results) == 100
    (broken,) = (r for r in results if "error" in r)
    assert str(folder / "broken.jpg") in broken["error"]
    view = preprocessing(weights)
    assert view == SMALL_VIEW
    model, variables = MODEL, __import__("vgg_jax").load(weights)[1]
    for result in results[:5]:
        logits = model.apply(variables, view(PIL.Image.open(result["image"]))[None])[0]
        expected = np.asarray(jax.nn.softmax(logits))
        best = np.argsort(-expected)[:5]
        assert [p["class"] for p in result["predictions"]] == best.tolist()
        found = [p["probability"] for p in result["predictions"]]
        np.testing.assert_allclose(found, expected[best], rtol=1e-4)  # float32, other batch size
        assert result["predictions"][0]["name"] == class_names(1000)[best[0]]


def test_class_names_are_torchvisions(torchvision):
    assert class_names(1000) == torchvision.models.VGG16_Weights.IMAGENET1K_V1.meta["categories"]
    assert class_names(3) == ["0", "1", "2"]


def run(*arguments):
    command = [sys.executable, "-m", "vgg_jax.predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(weights, folder):
    process = run("--weights", weights, "--json", "--top", 2, folder / "00.jpg", folder / "broken.jpg")
    assert process.returncode == 1
    first, second = (json.loads(line) for line in process.stdout.splitlines())
    assert len(first["predictions"]) == 2
    assert "broken.jpg" in second["error"]
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
    ):
        process = run(*arguments)
        assert process.returncode == 2
        (error,) = process.stderr.splitlines()
        assert part in error


def test_a_billion_pixels_are_refused_by_the_header(weights, tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 32_000, 32_000)  # width and height, at the head of the file
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    (result,) = predict(weights, [str(path)])
    assert "bomb.png: not a readable image: Image size (1024000000 pixels)" in result["error"]


def test_one_pixel_is_an_image(weights, tmp_path):
    PIL.Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    (result,) = predict(weights, [str(tmp_path / "one.png")])
    assert len(result["predictions"]) == 5


# --- pretrained networks


def test_pretrained_from_the_hub_is_checked(tmp_path, monkeypatch):
    """The hub's cache names a large file by its SHA-256."""
    import huggingface_hub

    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    model = VGG(11, num_classes=3, hidden=(8, 8))
    variables = variables_of(model)
    save(tmp_path / "model.safetensors", model, variables)
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
    assert_equal_trees(load_pretrained("vgg11_bn")[1], variables)
    assert asked == [("timm/vgg11_bn.tv_in1k", "model.safetensors")]
    assert preprocessing("vgg11_bn") == IMAGENET

    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with raises_user_error("has sha256", f"expected {blob.name}"):
        load_pretrained("vgg11_bn")


def test_offline_it_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    import huggingface_hub

    def unreachable(**options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    placed = tmp_path / "vgg16.safetensors"
    with raises_user_error(
        str(placed), "https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors"
    ) as _:
        load_pretrained("vgg16")
    model = VGG(11, num_classes=3, pool_size=1, hidden=())
    variables = variables_of(model)
    save(placed, model, variables)
    assert_equal_trees(load_pretrained("vgg16")[1], variables)

    monkeypatch.setattr("vgg_jax.pretrained.KERAS_URL", "file:///nowhere/{net}.h5")
    with raises_user_error("file:///nowhere/vgg19.h5", str(tmp_path / "vgg19_caffe.h5")):
        load_pretrained("vgg19_caffe")


def test_the_authors_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    published_layout(network, tmp_path / "vgg16.h5")
    monkeypatch.setattr("vgg_jax.pretrained.KERAS_URL", f"file://{tmp_path}/{{net}}.h5")
    with raises_user_error("has md5", "expected 64373286793e3c8b2b4e3219cbf3544b"):
        load_pretrained("vgg16_caffe")
    assert os.listdir(tmp_path / "cache") == []
    md5 = hashlib.md5((tmp_path / "vgg16.h5").read_bytes()).hexdigest()
    monkeypatch.setitem(__import__("vgg_jax.pretrained").pretrained.AUTHORS_MD5, "vgg16_caffe", md5)
    model, variables = load_pretrained("vgg16_caffe")
    assert model.depth == 16
    np.testing.assert_array_equal(
        variables["params"]["conv1_1"]["kernel"], network.get_layer("block1_conv1").get_weights()[0]
    )
    (tmp_path / "vgg16.h5").unlink()
    load_pretrained("vgg16_caffe")
    assert os.listdir(tmp_path / "cache") == ["vgg16_caffe.h5"]
    assert preprocessing("vgg16_caffe") == AUTHORS


def test_unknown_names_list_those_there_are():
    with raises_user_error("'vgg12'", "vgg11, vgg11_bn, vgg13", "vgg19_caffe"):
        load_pretrained("vgg12")
