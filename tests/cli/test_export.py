"""`python -m vgg_jax export`."""

import jax
import onnx
import pytest

from tests.conftest import photographs
from tests.weights.test_folding import network
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import CIFAR10, Network, load
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


@pytest.mark.parametrize("name", ["net.pth", "timm/"])
def test_end_of_the_target_decides_the_format(name, run, source, tmp_path, capsys):
    assert run(source, f"{tmp_path}/{name}") == 0
    net, back = load(source), load(tmp_path / name)
    assert f"{name}: VGG-{net.model.depth}" in capsys.readouterr().out
    assert back.model.stages == net.model.stages
    assert_equal_trees(back.variables, net.variables)


def test_command_writes_a_program_of_jax(run, source, tmp_path, capsys):
    target = tmp_path / "any.stablehlo"
    options = ("--dynamic-size", "--softmax", "--platforms", "cpu,cuda", "--beside")
    assert run(source, target, *options) == 0
    assert f"the weights are in {tmp_path}/any.safetensors" in capsys.readouterr().err
    program = jax.export.deserialize(bytearray(target.read_bytes()))
    assert program.platforms == ("cpu", "cuda")
    assert str(program.in_avals[-1].shape) == "(n, h, w, 3)"
    assert "exponential" in program.mlir_module()
    assert run(source, target, "--size", "40") == 0
    program = jax.export.deserialize(bytearray(target.read_bytes()))
    assert str(program.in_avals[0].shape) == "(n, 40, 40, 3)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net.onx",), "net.onx ends in '.onx'; expected .pth, .pt, .safetensors, .weights.h5, .stablehlo or .onnx"),
        (("net.stablehlo", "--beside"), "net.safetensors exists and is not the weights of a program"),
        (("net.pth", "--layout", "NHWC"), "--layout is for .onnx files; found net.pth: leave it out"),
        (("net.pth", "--check"), "leave it out, or run `vgg-jax convert --check` for .pth and .safetensors"),
        (("net.pth", "--size", "64"), "--size is for .onnx and .stablehlo files; found net.pth"),
        (("folder/", "--beside"), "--beside is for .stablehlo files; found folder/"),
        (("net.onnx", "--platforms", "cpu"), "--platforms is for .stablehlo files; found net.onnx"),
        (("net.stablehlo", "--uint8"), "--uint8 is for .onnx files; found net.stablehlo"),
        (("net.stablehlo", "--size", "64x65"), "--size is 64x65; expected one side for StableHLO, or --dynamic-size"),
        (("net.stablehlo", "--platforms", "npu"), "expected some of cpu, cuda, rocm, tpu"),
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
