"""`vgg_jax.load` and the network that it returns."""

import dataclasses
import functools
import io
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

import vgg_jax
from tests.conftest import photographs, raises_user_error, random_variables, relative_error
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import AUTHORS, CIFAR10, IMAGENET, VGG, Network, load
from vgg_jax.data.preprocessing import FEATURES, Preprocessing
from vgg_jax.features import layer_activations
from vgg_jax.network import imagenet_classes
from vgg_jax.weights.formats import Loaded

MODEL = VGG(11, num_classes=1000, pool_size=1, hidden=())
SMALL_VIEW = Preprocessing(40, 32)  # small images, so that the tests are quick
THREE = VGG(11, num_classes=3, pool_size=1, hidden=(8,))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    Network(MODEL, random_variables(MODEL, 32, 32, 3), SMALL_VIEW, imagenet_classes()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def net(weights):
    return load(weights)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return a file of a network with three classes and a hidden layer."""
    path = tmp_path_factory.mktemp("weights") / "three.safetensors"
    Network(THREE, random_variables(THREE, 32, 32, 3), SMALL_VIEW).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of 99 images in many formats and modes, and a file that is not an image."""
    images = tmp_path / "images"
    images.mkdir()
    formats = [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("jpg", "CMYK"), ("png", "L"), ("png", "P")]
    for i, image in enumerate(photographs(99)):
        suffix, mode = formats[i % len(formats)]
        image.resize((64, 50)).convert(mode).save(images / f"{i:02d}.{suffix}")
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "notes.txt").write_text("not an image by its suffix")
    return images


def test_folder_of_100_images_has_99_answers(net, folder):
    results = net.predict(str(folder))
    assert len(results) == 100
    (broken,) = (result for result in results if result.error)
    assert str(folder / "broken.jpg") in broken.error
    assert net.preprocessing == SMALL_VIEW
    for result in results[:5]:
        logits = MODEL.apply(net.variables, SMALL_VIEW(PIL.Image.open(result.image))[None])[0]
        expected = np.asarray(jax.nn.softmax(logits))
        best = np.argsort(-expected)[:5]
        assert list(result.labels) == best.tolist()
        np.testing.assert_allclose(result.probabilities, expected[best], rtol=1e-4)  # float32, other batch size
        assert result.names[0] == imagenet_classes()[best[0]]


def test_images_in_memory_are_answered_as_files(net, tmp_path):
    image = photographs(1)[0].convert("RGB")
    image.save(tmp_path / "image.png")
    pixels = np.asarray(image)
    results = net.predict([tmp_path / "image.png", image, pixels], top=3)
    assert [len(result.labels) for result in results] == [3, 3, 3]
    assert [result.image for result in results] == [str(tmp_path / "image.png"), "image 1", "image 2"]
    assert len({(result.labels, result.probabilities) for result in results}) == 1
    assert [r.labels for r in net.predict(np.stack([pixels, pixels]), top=3)] == [results[0].labels] * 2
    assert net.predict(image, top=3)[0].labels == results[0].labels


def test_truncated_image_in_memory_is_refused(net):
    file = io.BytesIO()
    photographs(1)[0].convert("RGB").save(file, "JPEG")
    image = PIL.Image.open(io.BytesIO(file.getvalue()[:-500]))  # Pillow decodes it when its pixels are needed
    for read in (net.preprocess, net.predict):
        with raises_user_error(f"an image of {image.width}x{image.height} pixels: not a readable image: image file is"):
            read(image)


def test_one_pixel_is_an_image(net, tmp_path):
    PIL.Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    (result,) = net.predict(tmp_path / "one.png")
    assert len(result.labels) == 5


def test_1000_classes_are_not_taken_for_imagenets(weights, net, tmp_path):
    """Only the file, the name of a pretrained network or the user can state that the classes are ImageNet's."""
    for name in ("vgg.safetensors", "vgg.pth"):
        dataclasses.replace(net, classes=None).save(tmp_path / name)
        assert load(tmp_path / name).classes is None
    (result,) = load(tmp_path / name).predict(photographs(1))
    assert result.names == tuple(map(str, result.labels))


def test_imagenet_classes_are_torchvisions(net, torchvision):
    categories = torchvision.models.VGG16_Weights.IMAGENET1K_V1.meta["categories"]
    assert list(imagenet_classes()) == list(net.classes) == categories


def test_unnamed_classes_are_numbers(three):
    net = load(three)
    assert net.classes is None
    (result,) = net.predict(photographs(1))
    assert sorted(result.names) == ["0", "1", "2"]  # at most as many as there are classes


def test_given_classes_name_the_predictions(three):
    net = load(three, classes=["cat", "dog", "emu"])
    assert net.classes == ("cat", "dog", "emu")
    (result,) = net.predict(photographs(1))
    assert result.names == tuple(net.classes[i] for i in result.labels)
    with raises_user_error("three.safetensors has 3 classes; found 2 names"):
        load(three, classes=("cat", "dog"))


def test_call_returns_the_logits(net):
    images = np.stack([net.preprocess(image) for image in photographs(2)])
    assert images.dtype == np.float32
    optimized, replaced = vgg_jax.optimize_for_inference(MODEL, net.variables, images.shape)
    np.testing.assert_array_equal(net(images), jax.jit(optimized.apply)(replaced, images))
    assert relative_error(net(images), MODEL.apply(net.variables, images)) < 2e-6


def test_features_are_the_layer_activations(net):
    images = np.stack([net.preprocess(image) for image in photographs(2)])
    found = net.features(images, ("conv1_1", "pool5"))
    optimized, replaced = vgg_jax.optimize_for_inference(net.model, net.variables, images.shape)
    program = jax.jit(functools.partial(layer_activations, layers=("conv1_1", "pool5")), static_argnums=0)
    assert_equal_trees(found, program(optimized, replaced, images))
    expected = program(net.model, net.variables, images)
    assert all(relative_error(found[layer], expected[layer]) < 2e-6 for layer in expected)
    assert list(net.features(images, "relu2_1")) == ["relu2_1"]
    with raises_user_error("found no layer relu9_9; expected some of conv1_1, relu1_1"):
        net.features(images, ("relu9_9",))


def test_shallow_features_need_only_small_images(narrow):
    model = VGG(16, num_classes=None, hidden=())
    net = Network(model, random_variables(model, 32, 32, 3), None)
    images = np.random.default_rng(0).normal(size=(2, 18, 18, 3)).astype(np.float32)
    assert net.features(images, "relu1_2")["relu1_2"].shape == (2, 18, 18, 8)
    distance = vgg_jax.features.perceptual_distance(model, net.variables, images, images[::-1], {"relu1_2": 1.0})
    assert (distance > 0).all()
    with pytest.raises(ValueError, match="at least 32, which 5 max pools need"):
        net(images)


def test_features_only_drops_the_head(three):
    net = load(three, features_only=True)
    assert (net.model.num_classes, net.model.hidden, net.classes) == (None, (), None)
    assert "fc6" in load(three).variables["params"]
    assert not {"fc6", "fc7", "fc8"} & net.variables["params"].keys()
    images = np.stack([net.preprocess(image) for image in photographs(2)])
    pool5 = net.features(images, "pool5")["pool5"]
    np.testing.assert_array_equal(net(images), pool5.reshape(2, -1))
    with raises_user_error("three.safetensors holds features only; expected a network with classes"):
        net.predict(photographs(1))
    unknown = dataclasses.replace(net, preprocessing=None)  # to pass one would not help
    with raises_user_error("holds features only", "compute features in Python with vgg_jax.load(...).features"):
        unknown.predict(photographs(1))


def test_folders_of_hugging_face_name_their_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with raises_user_error("is not the directory of a run", f"pass {tmp_path / 'model.safetensors'}"):
        load(tmp_path)


def test_given_preprocessing_replaces_that_of_the_file(three):
    assert load(three).preprocessing == SMALL_VIEW
    assert load(three, preprocessing=CIFAR10).preprocessing == CIFAR10
    for wrong, line in (
        (dict(mean=(123.68, 116.779, 103.939)), "expected that of pixels in [0, 1]: divide the mean and std of pixels"),
        (dict(std=(58.4, 57.1, 57.4)), "expected that of pixels in [0, 1], above 0: divide that of pixels by 255"),
        (dict(std=(0.0, 0.2, 0.2)), "above 0"),
        (dict(channel_order="L"), "expected 1 of each for the channel order L"),
        (dict(channel_order="RGBA"), "expected one of RGB, BGR, L"),
        (dict(resize=200), "the short side is resized to 200; expected at least the crop of 224"),
    ):
        with raises_user_error(line):
            load(three, preprocessing=Preprocessing(**wrong))
    with raises_user_error("outputs is 'argmax'; expected one of softmax, sigmoid, values"):
        load(three, outputs="argmax")
    for known in (IMAGENET, AUTHORS, CIFAR10, FEATURES):
        known.check()


@pytest.mark.parametrize("name", ["vgg.safetensors", "vgg.pth"])
def test_saved_network_is_loaded_unchanged(name, three, tmp_path):
    net = load(three)
    net.save(tmp_path / name)
    back = load(tmp_path / name)
    assert back.model == net.model
    assert_equal_trees(back.variables, net.variables)
    assert back.preprocessing == SMALL_VIEW


def test_pretrained_names_come_before_files(three, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vgg16").mkdir()
    net = load(three)
    read = Loaded(net.model, net.variables, net.preprocessing)
    monkeypatch.setattr("vgg_jax.weights.download.load_pretrained", lambda name, announce: {"vgg16": read}[name])
    assert load("vgg16").model == THREE


def test_preprocess_takes_arrays_of_gray_and_color(net):
    gray = np.asarray(photographs(1)[0].convert("L"))
    expected = net.preprocess(PIL.Image.fromarray(gray))
    assert expected.shape == (32, 32, 3)
    np.testing.assert_array_equal(net.preprocess(gray), expected)
    np.testing.assert_array_equal(net.preprocess(gray[..., None]), expected)
    np.testing.assert_array_equal(net.preprocess(np.stack([gray] * 3, -1)), expected)


def test_wrong_inputs_are_refused(net, three, tmp_path):
    with raises_user_error("found an array of float32 and shape (8, 8, 3); expected uint8"):
        net.predict(np.zeros((8, 8, 3), np.float32))
    with raises_user_error("shape (8, 8, 2); expected uint8 and (H, W) or (H, W, C)"):
        net.preprocess(np.zeros((8, 8, 2), np.uint8))
    with raises_user_error("top is 0; expected 1 or more"):
        net.predict(photographs(1), top=0)
    with raises_user_error("batch_size is 0; expected 1 or more"):
        net.predict(photographs(1), batch_size=0)
    with raises_user_error("is a folder without images"):
        net.predict(tmp_path)
    with raises_user_error("runs/missing does not exist"):
        load("runs/missing", step="best")
    with raises_user_error("vgg12 does not exist", "a run's directory", "vgg11_bn"):
        load("vgg12")
    with raises_user_error("takes images of 3 channel(s), and its preprocessing gives 1"):
        load(three, preprocessing=Preprocessing(32, 32, (0.5,), (0.25,), "L")).preprocess(photographs(1)[0])


LIGHT = """
import sys

for name in (
    *("array_record", "cykooz", "google_crc32c", "grain", "h5py", "keras", "matplotlib", "ml_collections", "onnx"),
    *("requests", "simplejpeg", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "torch", "torchvision"),
):
    sys.modules[name] = None  # an import then fails as if the package were not installed

import vgg_jax

assert not {"optax", "orbax.checkpoint", "huggingface_hub", "vgg_jax.config"} & sys.modules.keys(), "slow"
net = vgg_jax.load(sys.argv[1])
print(net.predict(sys.argv[2])[0].names[0])
"""


def test_prediction_needs_only_the_core_packages(weights, net, tmp_path):
    """The packages of the extras are hidden, and those that take long to import stay out of `import vgg_jax`."""
    photographs(1)[0].save(tmp_path / "photo.png")
    command = [sys.executable, "-c", LIGHT, weights, str(tmp_path / "photo.png")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.stderr == ""
    assert process.stdout.strip() == net.predict(tmp_path / "photo.png")[0].names[0]


def test_public_names():
    names = {"AUTHORS", "CIFAR10", "IMAGENET", "VGG", "Network", "UserError", "__version__", "features"}
    functions = {"fold_batch_norm", "from_torch", "load", "optimize_for_inference", "to_torch"}
    assert set(vgg_jax.__all__) == names | functions
    assert all(hasattr(vgg_jax, name) for name in vgg_jax.__all__)


def test_import_of_the_package_leaves_jax_alone():
    """A command sets environment variables that JAX reads when it is imported."""
    code = """
import sys, vgg_jax
assert "jax" not in sys.modules
assert set(vgg_jax.__all__) >= {"VGG", "Network", "load", "features"}
for name in vgg_jax.__all__:
    assert getattr(vgg_jax, name) is not None
assert vgg_jax.features.gram_matrix
try:
    vgg_jax.nothing
except AttributeError as error:
    assert "'nothing'" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
