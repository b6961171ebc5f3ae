"""What the outputs of a network mean, in prediction and in files: softmax, sigmoid or values."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors
import safetensors.numpy

from tests.conftest import raises_user_error, random_variables
from vgg_jax import VGG, Network, load, to_torch
from vgg_jax.cli import convert, predict
from vgg_jax.data.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("narrow")
VIEW = Preprocessing(40, 32)
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)


def network(num_classes, outputs="softmax"):
    model = VGG(11, num_classes=num_classes, pool_size=1, hidden=())
    variables = random_variables(model, 32, 32, 3)
    variables["params"]["fc8"]["kernel"] *= 100
    return Network(model, variables, VIEW, outputs=outputs)


def logits(net):
    return np.asarray(net(net.preprocess(IMAGE)[None])[0], np.float64)


def test_sigmoid_gives_independent_probabilities():
    net = network(3, "sigmoid")
    expected = 1 / (1 + np.exp(-logits(net)))
    (result,) = net.predict(IMAGE)
    assert list(result.labels) == np.argsort(-expected).tolist()
    np.testing.assert_allclose(result.probabilities, np.sort(expected)[::-1], rtol=1e-5)
    assert result.values == ()
    assert [len(r.probabilities) for r in net.predict(IMAGE, top=1)] == [1]


def test_values_are_the_numbers_in_their_order():
    net = network(7, "values")
    (result,) = net.predict(IMAGE, top=2)
    np.testing.assert_allclose(result.values, logits(net), rtol=1e-5)
    assert (result.labels, result.probabilities) == (tuple(range(7)), ())


def test_softmax_of_one_output_is_refused():
    net = network(1)
    assert logits(net).shape == (1,)
    assert net.features(net.preprocess(IMAGE)[None], "relu1_1")["relu1_1"].shape == (1, 32, 32, 8)
    with raises_user_error("the network has one output, whose softmax is always 1", "outputs='sigmoid'", "--outputs"):
        net.predict(IMAGE)


def test_one_output_with_sigmoid_is_the_positive_class(tmp_path):
    """The file is another's: torchvision's names, without a word about the outputs."""
    net = network(1)
    path = str(tmp_path / "binary.safetensors")
    safetensors.numpy.save_file(to_torch(net.model, net.variables), path)
    with raises_user_error(f"{path} has one output"):
        load(path, preprocessing=VIEW).predict(IMAGE)
    (result,) = load(path, preprocessing=VIEW, outputs="sigmoid").predict(IMAGE)
    np.testing.assert_allclose(result.probabilities, 1 / (1 + np.exp(-logits(net))), rtol=1e-5)


def test_unknown_outputs_are_refused(tmp_path):
    with raises_user_error("outputs is 'tanh'; expected one of softmax, sigmoid, values"):
        load("vgg16", outputs="tanh")


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid", "values"])
def test_saved_file_keeps_the_outputs(outputs, tmp_path):
    path = str(tmp_path / "net.safetensors")
    network(2, outputs).save(path)
    assert load(path).outputs == outputs
    other = "values" if outputs == "sigmoid" else "sigmoid"
    assert load(path, outputs=other).outputs == other


def test_pth_file_keeps_the_outputs(tmp_path):
    path, target = str(tmp_path / "net.safetensors"), str(tmp_path / "net.pth")
    network(2, "sigmoid").save(path)
    assert convert.main([path, target]) == 0
    assert load(target).outputs == "sigmoid"


def test_file_with_unknown_outputs_is_refused(tmp_path):
    path = str(tmp_path / "net.safetensors")
    network(2, "sigmoid").save(path)
    with safetensors.safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
        metadata = {**file.metadata(), "outputs": "tanh"}
    safetensors.numpy.save_file(arrays, path, metadata)
    with raises_user_error("its metadata state outputs 'tanh'; expected one of softmax, sigmoid, values"):
        load(path)


def test_command_prints_probabilities_or_numbers(tmp_path, capsys):
    path, image = str(tmp_path / "one.safetensors"), str(tmp_path / "image.png")
    net = network(1)
    net.save(path)
    PIL.Image.fromarray(IMAGE).save(image)
    (logit,) = logits(net)
    probability = float(jax.nn.sigmoid(logit))
    assert predict.main(["--weights", path, image]) == 2
    assert "has one output, whose softmax is always 1" in capsys.readouterr().err
    assert predict.main(["--weights", path, "--outputs", "sigmoid", image]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == f"{probability:.2%}"
    assert predict.main(["--weights", path, "--outputs", "values", image]) == 0
    assert float(capsys.readouterr().out.splitlines()[1].split()[0]) == pytest.approx(logit, rel=1e-4)
    assert predict.main(["--weights", path, "--outputs", "values", "--json", image]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line.keys() == {"image", "values"}
    assert line["values"] == pytest.approx([logit], rel=1e-5)
