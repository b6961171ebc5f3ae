"""Programs of StableHLO: run where vgg_jax cannot be imported, they give the network's logits."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import raises_user_error, random_variables, relative_error
from tests.export.pages import run_page, snippets
from vgg_jax import IMAGENET, VGG, Network
from vgg_jax.data.preprocessing import CIFAR10
from vgg_jax.model import PLAIN

BATCHES = (1, 3, 64)
# The page's programs, in a process whose import of vgg_jax and Flax fails, on images that the test wrote.
ALONE = """
import sys
sys.modules["vgg_jax"] = sys.modules["flax"] = None
import numpy as np
import jax
jax.config.update("jax_enable_compilation_cache", False)
for count in COUNTS:
    images = np.load(f"images{count}.npy")
    np.save(f"answers{count}.npy", run(images))
"""


def network(preprocessing=CIFAR10, **fields):
    model = VGG(**dict(depth=11, num_classes=10, pool_size=1, hidden=(32, 32)) | fields)
    return Network(model, random_variables(model, 32, 32, 3), preprocessing)


def run_alone(folder, program, shape, counts=BATCHES):
    """Run a program of the page in a folder with images of a shape; return its answers by the number of images."""
    random = np.random.default_rng(0)
    images = {count: random.standard_normal((count, *shape), np.float32) for count in counts}
    for count, batch in images.items():
        np.save(folder / f"images{count}.npy", batch)
    *lines, last = [line for line in program.splitlines() if line and not line.startswith(("print", "images ="))]
    last = re.sub(r"np\.zeros\(\(.*?\), np\.float32\)", "images", last)
    name, _, call = last.partition(" = ")
    assert name in ("logits", "probabilities")
    body = "\n".join([*lines, f"run = lambda images: {call}"])
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = ALONE.replace("for count in COUNTS", f"{body}\nfor count in {counts}", 1)
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=settings, check=True)
    return {count: (batch, np.load(folder / f"answers{count}.npy")) for count, batch in images.items()}


@pytest.mark.parametrize("batch_norm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_program_runs_without_vgg_jax(batch_norm, narrow, tmp_path):
    net = network(batch_norm=batch_norm)
    net.save(tmp_path / "vgg11.stablehlo", size=64)
    program = next(text for text in snippets("stablehlo.md") if 'open("vgg11.stablehlo"' in text)
    assert len(program.splitlines()) <= 10
    for batch, answer in run_alone(tmp_path, program, (64, 64, 3)).values():
        assert relative_error(answer, net(batch)) < 1e-6


@pytest.mark.slow
def test_weights_beside_serve_any_size(narrow, tmp_path):
    net = network(conv_head=True, pool_size=7)
    net.save(tmp_path / "beside.stablehlo", size="any", beside=True, probabilities=True)
    program = next(text for text in snippets("stablehlo.md") if 'open("beside.stablehlo"' in text)
    assert len(program.splitlines()) <= 10
    for batch, answer in run_alone(tmp_path, program, (65, 97, 3)).values():
        assert relative_error(answer, jax.nn.softmax(net(batch))) < 1e-6


@pytest.mark.slow
def test_program_of_float64_equals_the_network(narrow, x64, tmp_path):
    """At every size, in the precision in which the order of sums does not matter."""
    net = network(dtype=np.float64, param_dtype=np.float64, batch_norm=True)
    net.save(tmp_path / "a.stablehlo", size="any")
    program = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes()))
    images = np.random.default_rng(0).standard_normal((2, 40, 72, 3))
    assert relative_error(program.call(images), net(images)) < 1e-12


def test_one_file_serves_every_platform(narrow, tmp_path):
    network().save(tmp_path / "a.stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert str(program.in_avals[0].shape) == "(n, 32, 32, 3)"
    calls = set(re.findall(r"stablehlo\.custom_call @(\w+)", program.mlir_module()))
    assert calls <= {"shape_assertion"}, "only calls that JAX promises to keep"
    assert sorted(os.listdir(tmp_path)) == ["a.stablehlo"]
    for platform in ("cuda", "tpu"):
        network().save(tmp_path / f"{platform}.stablehlo", platforms=(platform,))
        program = jax.export.deserialize(bytearray((tmp_path / f"{platform}.stablehlo").read_bytes()))
        assert program.platforms == (platform,)


@pytest.mark.parametrize(
    ("fields", "options", "line"),
    [
        (dict(head_pool="max"), dict(size="any"), 'head_pool="max" takes no images of any size; expected a fixed size'),
        (dict(preprocessing=None), dict(), "states no preprocessing; expected the size of the images: pass size=224"),
        (dict(), dict(size=16), 'size is 16; expected 32 pixels or more, or "any"'),
        (dict(), dict(size="large"), "size is 'large'; expected 32 pixels or more"),
        (dict(), dict(platforms=("cpu", "npu")), "expected some of cpu, cuda, rocm, tpu"),
        (dict(), dict(platforms=()), "expected some of cpu, cuda, rocm, tpu"),
    ],
    ids=["max", "unknown", "small", "word", "npu", "none"],
)
def test_impossible_program_is_refused(fields, options, line, narrow, tmp_path):
    with raises_user_error(line):
        network(**fields).save(tmp_path / "a.stablehlo", **options)
    assert not list(tmp_path.iterdir())


def test_other_suffix_is_refused(narrow, tmp_path):
    with raises_user_error("ends in '.mlir'"):
        network().save(tmp_path / "a.mlir")
    with raises_user_error("is a file of weights; found the options size: leave them out"):
        network().save(tmp_path / "a.safetensors", size=64)
    assert not list(tmp_path.iterdir())


def test_missing_flatbuffers_is_named(narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with raises_user_error("pip install 'vgg_jax[export]'"):
        network().save(tmp_path / "a.stablehlo")


def test_stablehlo_page_runs(narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network().save("vgg11.safetensors")
    found = run_page("stablehlo.md")
    assert found["logits"].shape == (3, 10)
    assert found["probabilities"].sum() == pytest.approx(1)


# The network in a process that compiles as for users, with its weights as arguments and as constants.
OURS = """
import jax
import numpy as np
from vgg_jax import load
net = load("net.safetensors")
ours = jax.jit(net.model.apply)
constants = jax.jit(lambda images: net.model.apply(net.variables, images))
for count in (1, 3):
    images = np.load(f"images{count}.npy")
    np.save(f"ours{count}.npy", ours(net.variables, images))
    np.save(f"constants{count}.npy", constants(images))
"""


def exact_logits(net, images):
    """Return the logits in float64."""
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net.variables)
        model = net.model.clone(dtype=np.float64, layers=PLAIN)
        return np.asarray(jax.jit(model.apply)(variables, images.astype(np.float64)))


@pytest.mark.slow
def test_full_program_gives_the_logits(tmp_path, monkeypatch):
    """XLA compiles weights that are constants in another way than arguments, so the network is compiled in both ways.

    The orders of the sums in float32 differ: by 3.0e-6 for one image. Against float64 the network has an error of
    2.7e-6 with arguments and of 1.3e-6 with constants.
    """
    monkeypatch.setenv("XLA_FLAGS", "")
    net = network(IMAGENET, depth=16, num_classes=1000, pool_size=7, hidden=(4096, 4096))
    net.save(tmp_path / "net.safetensors")
    net.save(tmp_path / "vgg11.stablehlo")
    net.save(tmp_path / "beside.stablehlo", beside=True)
    inside, beside = (
        run_alone(tmp_path, next(text for text in snippets("stablehlo.md") if f'open("{name}.stablehlo"' in text),
                  (224, 224, 3), (1, 3))
        for name in ("vgg11", "beside")
    )  # fmt: skip
    root = pathlib.Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", OURS], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
    for count, (images, of_constants) in inside.items():
        ours, constants = (np.load(tmp_path / f"{name}{count}.npy") for name in ("ours", "constants"))
        assert relative_error(beside[count][1], ours) < 1e-6, count
        assert relative_error(of_constants, constants) < 1e-6, count
        assert relative_error(of_constants, ours) < 1e-5, count
        exact = exact_logits(net, images)
        assert relative_error(of_constants, exact) < 1.2 * relative_error(ours, exact), count
