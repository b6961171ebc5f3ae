"""What `predict` does until its first answer: the modules it imports, the programs it compiles, the memory it needs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.narrow import NARROW_TABLE
from vgg_jax import CIFAR10, IMAGENET, VGG, Network
from vgg_jax.model import TABLE_1

CODE = """
import importlib.metadata, json, re, sys
importlib.metadata.entry_points = lambda **group: ()
import jax
from vgg_jax.cli import predict
from vgg_jax.model import TABLE_1
TABLE_1.update(json.loads(sys.argv[1]))

def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1]) // 1024

imports, compiled = peak(), []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile_duration" in event else None
)
code = predict.main(sys.argv[2:])
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(dict(code=code, compiled=len(compiled), modules=modules, imports=imports, peak=peak())))
"""


def save_network(path, model, side, preprocessing):
    """Save a network of constant weights."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-3, leaf.dtype), shapes)
    Network(model, variables, preprocessing).save(path)


def first_answer(folder, table, photo_side=40):
    PIL.Image.effect_noise((photo_side, photo_side), 90).save(folder / "photo.png")
    arguments = ["--weights", str(folder / "net.safetensors"), str(folder / "photo.png")]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", CODE, json.dumps(table), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_predict_compiles_one_program_and_imports_little(tmp_path, monkeypatch):
    """The weights are converted by NumPy; softmax is a part of the network's program."""
    for column, stages in NARROW_TABLE.items():
        monkeypatch.setitem(TABLE_1, column, stages)
    save_network(tmp_path / "net.safetensors", VGG(depth=11, num_classes=9, pool_size=1, hidden=()), 32, CIFAR10)
    answer = first_answer(tmp_path, NARROW_TABLE)
    assert answer["code"] == 0
    assert answer["compiled"] == 1
    absent = {"torch", "tensorflow_datasets", "grain", "orbax", "optax", "matplotlib", "tensorboardX", "keras", "h5py"}
    assert not absent & set(answer["modules"])


@pytest.mark.slow
def test_predict_holds_the_weights_once(tmp_path):
    """VGG-16 has 528 MiB of weights; 1.3 times as much is needed beyond the imports."""
    save_network(tmp_path / "net.safetensors", VGG(depth=16), 224, IMAGENET)
    answer = first_answer(tmp_path, {}, 300)
    print(f"imports {answer['imports']} MiB, peak {answer['peak']} MiB")
    assert answer["peak"] - answer["imports"] < 1.3 * 528
