"""OpenVINO and ncnn read the ONNX file of VGG-16 with batch norm, and ONNX Runtime one in 8-bit integers."""

import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import photographs, random_variables, relative_error
from tests.export.test_onnx_export import images_of, program, run
from tests.weights.test_folding import network
from vgg_jax import IMAGENET, VGG, load
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.export.onnx_file import write_onnx
from vgg_jax.export.onnx_int8 import write_int8
from vgg_jax.export.onnx_options import OnnxOptions
from vgg_jax.weights.formats import Loaded


@pytest.fixture(scope="module")
def full():
    """Return VGG-16 with batch norm as in a new network, with an image and its logits."""
    model = VGG(16, batch_norm=True)
    variables = random_variables(model, 224, 224, 3)
    images = images_of(224, 224, count=1)
    return Loaded(model, variables, IMAGENET), images, np.asarray(program(model)(variables, images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # OpenVINO forks, and JAX warns
def test_openvino_computes_the_same_logits(full, tmp_path):
    import openvino  # of the extra `engines`

    network, images, expected = full
    write_onnx(tmp_path / "net.onnx", network)
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "net.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_error(compiled(images.transpose(0, 3, 1, 2))[0], expected) < 1e-4


# pnnx and ncnn run in a process of their own: their libraries clash with those of the tests.
NCNN = """
import sys
import ncnn
import numpy as np

folder = sys.argv[1]
net = ncnn.Net()
for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "bf16_packed"):
    if hasattr(net.opt, f"use_{name}"):
        setattr(net.opt, f"use_{name}", False)
assert net.load_param(f"{folder}/net.ncnn.param") == 0
assert net.load_model(f"{folder}/net.ncnn.bin") == 0
image = np.load(f"{folder}/image.npy")  # ncnn shares the memory of arrays, so that they must live
mat = ncnn.Mat(image)
with net.create_extractor() as extractor:
    assert extractor.input("in0", mat) == 0
    code, logits = extractor.extract("out0")
    assert code == 0
    np.save(f"{folder}/logits.npy", np.array(logits).copy())
"""


@pytest.mark.slow
def test_ncnn_computes_the_same_logits(full, tmp_path):
    import pnnx  # of the extra `engines`, with ncnn

    network, images, expected = full
    write_onnx(tmp_path / "net.onnx", network, OnnxOptions(batch=1))
    np.save(tmp_path / "image.npy", np.ascontiguousarray(images[0].transpose(2, 0, 1)))
    command = [pnnx.EXEC_PATH, "net.onnx", "fp16=0"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", NCNN, str(tmp_path)], check=True, capture_output=True)
    assert relative_error(np.load(tmp_path / "logits.npy"), expected[0]) < 1e-4


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("uint8", [False, True])
def test_int8_file_agrees_and_has_a_quarter_of_the_size(uint8, tmp_path, monkeypatch):
    """At most MOST_IMAGES of the folder calibrate the ranges."""
    monkeypatch.setattr("vgg_jax.export.onnx_int8.MOST_IMAGES", 8)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(photographs(10)):
        image.resize((40, 40)).save(folder / f"{i}.png")
    model, variables = network(num_classes=10, hidden=(256,), pool_size=7)
    view = Preprocessing(40, 40)
    given = Loaded(model, variables, view)
    options = OnnxOptions(uint8=uint8)
    assert write_int8(tmp_path / "int8.onnx", given, folder, options) == 8
    write_onnx(tmp_path / "float.onnx", given, options)
    inputs = np.stack([view.view(image) if uint8 else view(image) for image in photographs(10)]).transpose(0, 3, 1, 2)
    expected = run(tmp_path / "float.onnx", np.ascontiguousarray(inputs))
    assert relative_error(run(tmp_path / "int8.onnx", np.ascontiguousarray(inputs)), expected) < 0.1
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.3 * sizes[1]
    with pytest.raises(ValueError, match=r"QuantizeLinear .* the network is quantized; expected floats"):
        load(tmp_path / "int8.onnx")
