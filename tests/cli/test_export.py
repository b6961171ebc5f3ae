"""`python -m vgg_jax export`."""

import onnx
import pytest

from tests.conftest import photographs
from tests.weights.test_folding import network
from vgg_jax import CIFAR10, Network
from vgg_jax.cli import export

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs the command in this process."""
    monkeypatch.setattr(export, "configure", lambda: None)
    return lambda *arguments: export.main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    Network(*network(), CIFAR10).save(tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_command_writes_and_checks_a_file(run, source, tmp_path, capsys):
    target = tmp_path / "net.onnx"
    options = ("--uint8", "--layout", "NHWC", "--softmax", "--fold", "--batch", "2", "--size", "33x40", "--check")
    assert run(source, target, *options) == 0
    printed = capsys.readouterr().out
    assert f"{target}: VGG-11 with batch norm folded, " in printed
    assert "outputs of ONNX Runtime against vgg_jax's: relative error" in printed
    (images,) = onnx.load(target).graph.input
    assert [side.dim_value for side in images.type.tensor_type.shape.dim] == [2, 33, 40, 3]


def test_command_quantizes_with_a_folder(run, source, tmp_path, capsys):
    """A damaged image is skipped; the file has the metadata of the network."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(photographs(4)):
        image.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    target = tmp_path / "int8.onnx"
    assert run(source, target, "--int8", folder, "--check") == 0
    captured = capsys.readouterr()
    assert "folded in int8, calibrated by 4 images" in captured.out
    assert "skipped: " in captured.err
    model = onnx.load(target)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert "preprocessing" in {entry.key for entry in model.metadata_props}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net.pth",), "net.pth ends in '.pth'; expected .onnx: change the suffix"),
        (("net.onnx", "--size", "large"), "--size is 'large'; expected a side, or the height and the width"),
        (("missing/net.onnx",), "missing, the folder of net.onnx, does not exist; create it first"),
        (("net.onnx", "--int8", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(source, *arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors"]
