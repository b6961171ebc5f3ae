"""Files with the name of weights but another content are refused in one line with the remedy."""

import argparse
import fractions
import gzip
import io
import json
import warnings

import numpy as np
import pytest
import torch

from tests.conftest import raises_user_error, random_variables
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import VGG
from vgg_jax.weights.formats import load_file
from vgg_jax.weights.layouts import to_torch

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 553433881\n"


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def torch_script():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own, for all of TorchScript
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


CONTENTS = {
    "lfs": (lambda: POINTER.encode(), "is a text file of 134 bytes (a Git LFS pointer); download the file itself"),
    "html": (lambda: b"\n<!DOCTYPE html><html>Not found</html>", "(an HTML page); download the file itself"),
    "empty": (lambda: b"", "is an empty file (0 bytes); download it again"),
    "text": (lambda: "größe\n".encode() * 1000, "is a text file of 8,000 bytes; choose the file of the weights"),
    "json": (lambda: json.dumps({"model": "vgg"}).encode(), "is a text file of 16 bytes (JSON)"),
    "tensorflow": (lambda: bytes(90) + bytes.fromhex("57fb808b247547db"), "is a TensorFlow checkpoint of 98 bytes"),
    "tensorflow index": (lambda: b'model_checkpoint_path: "vgg_16.ckpt"\n', "(the index of a TensorFlow checkpoint)"),
    "npz": (npz, "is a NumPy archive (.npz)"),
    "npy": (npy, "is a NumPy array (.npy)"),
    "torchscript": (torch_script, "is a TorchScript archive"),
    "gguf": (lambda: b"GGUF\x03" + bytes(40), "is a GGUF file of a language model"),
    "gzip": (lambda: gzip.compress(b"x" * 100), "is a gzip archive"),
    "unknown": (lambda: b"\x01\xfe\xff" * 20, "has 60 bytes of no known format, whatever its name"),
}


# The suffix decides for an unknown content.
CELLS = [(kind, suffix) for kind in CONTENTS for suffix in ("pth", "safetensors", "h5", "bin")]
CELLS = [cell for cell in CELLS if cell[0] != "unknown" or cell[1] == "bin"]


@pytest.mark.parametrize(("kind", "suffix"), CELLS)
def test_other_contents_are_named(kind, suffix, tmp_path):
    content, expected = CONTENTS[kind]
    path = tmp_path / f"vgg16.{suffix}"
    path.write_bytes(content())
    known = "expected a .pth, .pt, .safetensors, .h5, .hdf5, .keras or .onnx file"
    with raises_user_error(f"vgg16.{suffix} ", expected, known):
        load_file(path)


def refusal(content, path, **options):
    torch.save(content, path, **options)
    with raises_user_error("executes nothing", "save torch.save(model.state_dict(), path) instead"):
        try:
            load_file(path)
        except ValueError as error:
            message = str(error)
            raise
    assert "weights_only" not in message
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_with_objects_name_their_type(zipped, tmp_path):
    options = dict(_use_new_zipfile_serialization=zipped)
    state_dict = torch.nn.Linear(2, 2).state_dict()
    path = tmp_path / "a.pth"
    message = refusal({"state_dict": state_dict, "at": fractions.Fraction(1, 3)}, path, **options)
    assert "holds an object of type fractions.Fraction" in message
    message = refusal({"state_dict": state_dict, "best": np.float64(0.5)}, path, **options)
    assert "holds a NumPy number or array (numpy." in message
    message = refusal(torch.nn.Sequential(torch.nn.Linear(2, 2)), path, **options)
    assert "holds a whole pickled module (torch.nn.modules.container.Sequential)" in message
    message = refusal({"at": fractions.Fraction(1, 3)}, path, pickle_protocol=4, **options)
    assert "holds an object of type fractions.Fraction" in message


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_a_training_command_are_ignored(zipped, tmp_path):
    """timm's CheckpointSaver and torchvision's references save an argparse.Namespace beside the weights."""
    model = VGG(11, num_classes=None)
    variables = random_variables(model, 32, 32, 3)
    state_dict = {name: torch.from_numpy(array) for name, array in to_torch(model, variables).items()}
    args = argparse.Namespace(model="vgg11", lr=0.1, device=torch.device("cpu"), nested=argparse.Namespace())
    torch.save(
        {"epoch": 3, "arch": "vgg11", "state_dict": state_dict, "args": args, "version": 2},
        tmp_path / "last.pth.tar",
        _use_new_zipfile_serialization=zipped,
    )
    assert_equal_trees(load_file(tmp_path / "last.pth.tar").variables, variables)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "holds a list; expected a state dict"),
        (torch.zeros(2), "holds a Tensor; expected a state dict"),
        ({}, "holds a dict; expected a state dict"),
        ({"epoch": 3, "best": 0.5}, "with convolutions; found the keys 'epoch', 'best'"),
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "found the keys 'model'"),
        ({"conv.weight": torch.zeros(2, 2, 3, 3)}, "found no features.0.weight among 1 names such as ['conv.weight']"),
        ({"ema": {"a.weight": torch.zeros(2, 2, 3, 3)}}, "under 'ema': found no features.0.weight among 1 names"),
        (
            {"features.0.weight": torch.zeros(64, 3, 3, 3, dtype=torch.int8)},
            "features.0.weight (64, 3, 3, 3) of int8",
        ),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3).to_sparse()}, "is a torch.sparse_coo tensor of torch.float32"),
        ({"features.0.weight": torch.zeros(1).expand(2**20, 2**20, 3, 3)}, "more than it holds numbers"),
    ],
)
def test_other_tensors_are_refused(content, expected, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with raises_user_error("a.pth: ", expected):
        load_file(tmp_path / "a.pth")
