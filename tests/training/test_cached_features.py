"""Cached features: the same bits as without the cache, and a notice of all that has changed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.conftest import raises_user_error
from vgg_jax import VGG
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.feature_store import DIGEST, FeatureStore
from vgg_jax.training.cached_features import last_cached_layer
from vgg_jax.training.checkpoints import read_latest
from vgg_jax.training.loop import train_and_evaluate
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.validation import check_config

PER_CLASS = 12


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("test", 5)):
        for name, color in (("cat", 60), ("dog", 160)):
            os.makedirs(tmp_path / "data" / split / name)
            for i in range(count):
                pixels = np.clip(random.normal(color, 60, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def make_config(folder, **fields):
    config = Config(
        model=ModelConfig(depth=11, hidden=(24, 16), pool_size=1),
        data=DataConfig(dataset=str(folder), pad=0),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),
        freeze=("features",),
        batch_size=8,
        eval_batch_size=8,
        num_epochs=3,
        flip_eval=True,
        features_dir=str(folder.parent / "features"),
    )
    return dataclasses.replace(config, **fields)


def trained(config, workdir):
    """Return the arrays of the last checkpoint, and the numbers of the evaluations."""
    check_config(config)
    assert train_and_evaluate(config, str(workdir)) == 0
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval"]
    return read_latest(str(workdir / "checkpoints")), lines


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_run_on_cached_features_equals_one_without(resident, folder, tmp_path, monkeypatch, capsys):
    """On eight devices, and with the tests' compiler options, XLA orders sums by what is fused around them."""
    if not resident:
        monkeypatch.setattr("vgg_jax.data.loader.RESIDENT_BYTES", 0)
    config = make_config(folder)
    expected = trained(config, tmp_path / "without")
    cached = dataclasses.replace(config, cache_features=True)
    runs = []
    for name, line in (("computed", "24 of 24 images are not cached yet"), ("read", "all 24 images are cached")):
        runs.append(trained(cached, tmp_path / name))
        assert line in capsys.readouterr().out
    assert_same(runs[1][0], runs[0][0])
    for a, b in zip(jax.tree.leaves(runs[0][0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["flips", "alternating", "plain", "stage5"])
def test_run_on_cached_features_has_the_same_bits(case, tmp_path):
    """VGG-11 of full width on one device, compiled as for users."""
    root = pathlib.Path(__file__).parents[2]
    program = str(pathlib.Path(__file__).with_name("cached_bits.py"))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, program, str(tmp_path), "wide", case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("arrays True evaluations True") == 2, done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_changed_image_weight_and_view_are_noticed(folder, tmp_path, capsys):
    config = make_config(folder, cache_features=True, num_epochs=1)
    trained(config, tmp_path / "first")
    changed = folder / "train" / "cat" / "3.png"
    Image.fromarray(np.zeros((40, 36, 3), np.uint8)).save(changed)
    capsys.readouterr()
    state, _ = trained(config, tmp_path / "image")
    assert "features of" in (output := capsys.readouterr().out)
    assert "1 of 24 images are new or changed" in output
    elsewhere = dataclasses.replace(config, features_dir=str(tmp_path / "elsewhere"))
    assert_same(state, trained(elsewhere, tmp_path / "new")[0])
    capsys.readouterr()
    trained(dataclasses.replace(config, seed=5), tmp_path / "weights")
    output = capsys.readouterr()
    assert "are for other weights: computing them again" in output.out + output.err
    config.data.resize = 40
    trained(config, tmp_path / "view")
    output = capsys.readouterr()
    assert "are for other view: computing them again" in output.out + output.err


def test_store_for_other_facts_names_the_difference(tmp_path, capsys):
    for facts in ({"weights": "a", "view": [1]}, {"weights": "b", "view": [1]}, {"weights": "b", "view": [2]}):
        FeatureStore(str(tmp_path), {"data": "d", **facts}, (1, 4), np.float32)
    output = capsys.readouterr()
    lines = [line for line in (output.out + output.err).splitlines() if "cached features of d" in line]
    assert ["other weights:" in lines[0], "other view:" in lines[1], len(lines)] == [True, True, 2]


KILLED = """
import os, sys
sys.path.insert(0, os.getcwd())
import numpy as np
from vgg_jax.data.feature_store import FeatureStore
store = FeatureStore(sys.argv[1], {"data": "d"}, (1, 4), np.float32)
with store.locked(), store.filling(10):
    store.append([bytes([1] * 16), bytes([2] * 16)], np.ones((2, 1, 4)))
    write, calls = os.fsync, []
    def die(descriptor):
        write(descriptor)
        os.kill(os.getpid(), 9)
    os.fsync = die
    store.append([bytes([3] * 16)], np.full((1, 1, 4), 3.0))
"""


def test_store_of_a_killed_process_holds_complete_rows_only(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    store = FeatureStore(str(tmp_path), {"data": "d"}, (1, 4), np.float32)
    digests = [bytes([i] * DIGEST) for i in (1, 2, 3)]
    assert store.find(digests).tolist() == [0, 1, -1]
    with store.locked(), store.filling(1):
        store.append(digests[2:], np.full((1, 1, 4), 5.0))
    assert store.rows[store.find(digests)][:, 0, 0].tolist() == [1, 1, 5]
    with open(os.path.join(store.directory, "digests.bin"), "ab") as file:
        file.write(b"half")  # a digest cut short by a crash
    with open(os.path.join(store.directory, "rows.bin"), "ab") as file:
        file.write(bytes(16))  # its row
    again = FeatureStore(str(tmp_path), {"data": "d"}, (1, 4), np.float32)
    assert (again.find(digests).tolist(), again.count) == ([0, 1, 2], 3)
    with open(os.path.join(again.directory, "store.json")) as file:
        assert json.load(file) == {"data": "d"}


def test_two_processes_do_not_fill_one_store(tmp_path):
    first, second = (FeatureStore(str(tmp_path), {"data": "d"}, (1, 4), np.float32) for _ in range(2))
    with (
        first.locked(),
        raises_user_error("another process is computing features", "wait until it ends"),
        second.locked(),
    ):
        pass


def test_full_disk_is_noticed_before_the_first_row(tmp_path):
    store = FeatureStore(str(tmp_path), {"data": "d"}, (2**20,), np.float32)
    with raises_user_error("GiB in ", "free disk space, or choose another"), store.filling(10**9):
        pass


@pytest.mark.parametrize(
    ("frozen", "layer"),
    [
        (("features",), "pool5"),
        (("stage1", "stage2", "stage3", "stage4", "conv5_1"), "relu5_1"),
        (("stage1", "stage3"), "pool1"),
        (("head",), None),
    ],
)
def test_cached_layer_is_the_last_that_depends_on_frozen_ones(frozen, layer):
    model = VGG(16, num_classes=10)
    assert last_cached_layer(model, model.layers_with_parameters(frozen)) == layer


@pytest.mark.parametrize(
    ("fields", "data", "line"),
    [
        (
            {},
            {"pad": 4},
            "because config.data.pad=4 changes the images in each epoch; only config.data.flip can be cached",
        ),
        ({"mixup": 0.2}, {"cutout": 8}, "because config.data.cutout=8, config.mixup=0.2 changes"),
        ({}, {"train_view": "random_resized_crop"}, "config.data.train_view=random_resized_crop changes"),
        ({}, {"corrupt_images": "skip"}, "False, because config.data.corrupt_images is skip"),
        (
            {"freeze": ("head",)},
            {},
            "the first layer, conv1_1, trains; expected frozen first layers: set config.freeze",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(fields, data, line, tmp_path):
    config = make_config(tmp_path / "data", **{"cache_features": True, **fields})
    config.data = dataclasses.replace(config.data, **data)
    with raises_user_error(line):
        check_config(config)


@pytest.mark.parametrize(
    "after", [pytest.param("relu1_1", marks=pytest.mark.slow), "pool3", pytest.param("pool5", marks=pytest.mark.slow)]
)
def test_layers_after_a_given_one_complete_the_network(after, narrow):
    model, images = VGG(11, True, num_classes=4, hidden=(8,)), jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = model.init(jax.random.key(1), images)
    features = model.apply(variables, images, last_layer=after)
    np.testing.assert_array_equal(model.apply(variables, features, after=after), model.apply(variables, images))
