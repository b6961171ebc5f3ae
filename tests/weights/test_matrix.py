"""Checkpoints in the wrappers and under the prefixes that people use give the network of the bare state dict."""

import itertools

import pytest
import safetensors.torch
import torch

from tests.conftest import raises_user_error
from tests.weights.test_layouts import assert_equal_trees, variables_of
from vgg_jax import VGG, from_torch, to_torch
from vgg_jax.weights.formats import load_file

WRAPPERS = ("none", "state_dict", "model", "net", "model_state_dict", "weights")
PREFIXES = {
    "none": lambda name: name,
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "net.": lambda name: f"net.{name}",
    "backbone.": lambda name: f"backbone.{name}",
    "encoder.": lambda name: f"encoder.{name}",
    "vgg.": lambda name: f"vgg.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "two at once": lambda name: f"_orig_mod.module.{name}",
    "four at once": lambda name: f"module._orig_mod.model.backbone.{name}",
    "module in features": lambda name: name.replace("features.", "features.module."),
}
SMALL = dict(num_classes=10, pool_size=1, hidden=())
MODELS = [VGG(11, **SMALL), VGG(16, batch_norm=True, **SMALL)]


def tensors_of(model):
    """Return random weights as a state dict of torch tensors."""
    return {name: torch.from_numpy(array) for name, array in to_torch(model, variables_of(model)).items()}


@pytest.fixture(params=MODELS, ids=["VGG-11", "VGG-16-BN"])
def weights(request, narrow):
    return tensors_of(request.param)


def check(path, weights, notes, expected=None):
    """Assert that a file has the variables of `from_torch`, and that one note line has all parts of `notes`."""
    loaded = load_file(path)
    model, variables = expected or from_torch(weights)
    assert loaded.model == model
    assert_equal_trees(loaded.variables, variables)
    assert (loaded.preprocessing, loaded.classes) == (None, None)
    for part in notes:
        assert any(part in note for note in loaded.notes), (part, loaded.notes)
    assert loaded.notes or not notes


@pytest.mark.parametrize("model", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)], ids=["11", "16-BN"])
def test_wrapped_and_prefixed_pth_files_are_read(model, narrow, tmp_path):
    """Each prefix in each wrapper."""
    weights = tensors_of(model)
    expected = from_torch(weights)
    for wrapper, (prefix, rename) in itertools.product(WRAPPERS, PREFIXES.items()):
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        content = renamed if wrapper == "none" else {wrapper: renamed, "epoch": 3, "optimizer": {"state": {}}}
        torch.save(content, tmp_path / "a.pth")
        notes = [] if wrapper == "none" else [f"the weights are those under {wrapper!r}"]
        if prefix.endswith("."):
            notes.append(f"removed {prefix} from the names")
        check(tmp_path / "a.pth", weights, notes, expected)


def test_prefixed_safetensors_are_read(weights, tmp_path):
    for rename in PREFIXES.values():
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        safetensors.torch.save_file(renamed, tmp_path / "a.safetensors")
        check(tmp_path / "a.safetensors", weights, [])


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pth.tar", ".PTH", ".pt", ""])
def test_any_name_of_a_pth_file_is_read(suffix, weights, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / f"a{suffix}")
    check(tmp_path / f"a{suffix}", weights, [])


def test_several_networks_are_refused(narrow, tmp_path):
    weights = tensors_of(MODELS[0])
    torch.save({"model": weights, "ema": dict(weights)}, tmp_path / "a.pth")
    with raises_user_error("holds several networks: under 'model', 'ema'; expected one"):
        load_file(tmp_path / "a.pth")
    pair = {f"{prefix}.{name}": tensor for prefix in ("student", "teacher") for name, tensor in weights.items()}
    torch.save(pair, tmp_path / "a.pth")
    with raises_user_error("holds several networks: student.features, teacher.features"):
        load_file(tmp_path / "a.pth")
    torch.save({name.replace("features.", ""): tensor for name, tensor in pair.items()}, tmp_path / "a.pth")
    with raises_user_error("holds several networks: beginning with student.0, teacher.0"):
        load_file(tmp_path / "a.pth")


def test_one_dict_under_two_keys_is_one_network(narrow, tmp_path):
    weights = tensors_of(MODELS[0])
    torch.save({"model": weights, "state_dict": weights}, tmp_path / "a.pth")
    check(tmp_path / "a.pth", weights, ["under 'model'"])


def test_parts_that_are_not_read_are_named(narrow, tmp_path):
    weights = tensors_of(MODELS[0])
    optimizer = {"state": {0: {"exp_avg": torch.zeros(8, 3, 3, 3)}}}
    parts = {part: {} for part in ("features", "classifier")}
    for name, tensor in weights.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    torch.save({**parts, "optimizer": optimizer}, tmp_path / "a.pth")
    (note, *_) = load_file(tmp_path / "a.pth").notes
    assert note == "the weights are those under 'features', and not those under 'classifier'"
    average = {"n_averaged": torch.tensor(1)} | {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": average}, tmp_path / "a.pth")
    with raises_user_error("holds several networks: under 'model', 'model_ema'"):
        load_file(tmp_path / "a.pth")


def test_missing_bias_of_the_head_is_named(narrow, tmp_path):
    weights = tensors_of(VGG(11, num_classes=3, pool_size=1, hidden=(8, 8)))
    del weights["classifier.3.bias"]
    torch.save(weights, tmp_path / "a.pth")
    with raises_user_error("missing classifier.3.bias (8,)"):
        load_file(tmp_path / "a.pth")


def wide_head(indices):
    """Return the arrays of a network with a 4096-wide head under `classifier` and these numbers."""
    weights = tensors_of(VGG(11, num_classes=10, hidden=(4096, 4096)))
    for ours, theirs in reversed(list(zip((0, 3, 6), indices, strict=True))):
        for leaf in ("weight", "bias"):
            weights[f"renamed.{theirs}.{leaf}"] = weights.pop(f"classifier.{ours}.{leaf}")
    return {name.replace("renamed", "classifier"): tensor for name, tensor in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("indices", [(0, 3, 6), (1, 4, 6), (0, 2, 4)], ids=["today", "2017", "no_dropout"])
def test_wide_heads_of_any_numbering_are_read(indices, narrow, tmp_path):
    torch.save({"state_dict": wide_head(indices)}, tmp_path / "a.pth")
    check(tmp_path / "a.pth", wide_head((0, 3, 6)), [])
