"""Folders in timm's shape: timm reads ours, we read timm's, and what timm has no name for is said."""

import dataclasses
import hashlib
import json
import math
import os

import huggingface_hub
import jax
import numpy as np
import pytest
import torch

from tests.conftest import photographs, raises_user_error, random_variables, relative_error
from tests.export.pages import run_page
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import AUTHORS, CIFAR10, IMAGENET, VGG, Network, load
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.export.card import Measured
from vgg_jax.export.timm_configs import crop_fraction

HEAD = dict(num_classes=3, hidden=(32, 4096))  # timm's fc2 has 4096 outputs; a narrow fc1 keeps the tests short
NAMES = ("cat", "dog", "güggel")


def network(preprocessing=IMAGENET, classes=NAMES, **fields):
    """Return a narrow network whose batch norm and biases are not those of a new one."""
    model = VGG(**dict(depth=11) | HEAD | fields)
    channels = len(preprocessing.mean) if preprocessing else 3
    variables = random_variables(model, 32, 32, channels)
    random = np.random.default_rng(1)
    noisy = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * random.random(leaf.shape, np.float32) if leaf.ndim == 1 else leaf,
        variables,
    )
    return Network(model, noisy, preprocessing, classes)


def timm_answers(timm, folder, images):
    """Return the logits of PIL images, by timm alone."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    with torch.no_grad():
        return net, net(torch.stack([transform(image) for image in images])).numpy()


def our_answers(net, images):
    return np.asarray(net(np.stack([net.preprocess(image) for image in images])))


@pytest.mark.parametrize(
    ("fields", "preprocessing"),
    [
        (dict(batch_norm=True), IMAGENET),
        (dict(conv_head=True), dataclasses.replace(IMAGENET, resize=288, crop=288)),
        pytest.param(dict(hidden=(4096, 4096)), CIFAR10, marks=pytest.mark.slow),
        (dict(), Preprocessing(resize=161, crop=100, mean=(0.5,), std=(0.25,), channel_order="L")),
        (dict(num_classes=None), IMAGENET),
    ],
    ids=["bn", "conv_head", "cifar10", "gray", "no classes"],
)
def test_timm_reads_our_folder(fields, preprocessing, narrow_timm, tmp_path):
    net = network(preprocessing, NAMES if fields.get("num_classes", 3) else None, **fields)
    net.save(tmp_path / "net")
    images = photographs(2)
    if preprocessing.channel_order == "L":
        images = [image.convert("L") for image in images]
    theirs, answers = timm_answers(narrow_timm, tmp_path / "net", images)
    assert relative_error(our_answers(net, images), answers) < 1e-5
    if net.classes:
        assert tuple(theirs.pretrained_cfg["label_names"]) == NAMES
    assert sorted(os.listdir(tmp_path)) == ["net"]
    assert sorted(os.listdir(tmp_path / "net")) == ["README.md", "config.json", "model.safetensors"]


def test_authors_order_is_saved_in_rgb(narrow_timm, tmp_path, capsys):
    net = network(AUTHORS)
    net.save(tmp_path / "net")
    assert "saved in the order RGB, because timm has no BGR" in capsys.readouterr().err
    images = photographs(2)
    assert relative_error(our_answers(net, images), timm_answers(narrow_timm, tmp_path / "net", images)[1]) < 1e-5
    assert relative_error(our_answers(load(tmp_path / "net"), images), our_answers(net, images)) < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        dict(batch_norm=True, dropout_rate=0.25),
        dict(depth=16, conv1x1=True),
        dict(lrn=True),
        dict(hidden=(), pool_size=1, head_pool="max"),
        dict(final_layer="relu4_1", num_classes=None, hidden=()),
    ],
    ids=["timm's", "C", "A-LRN", "max", "relu4_1"],
)
def test_our_folder_is_loaded_unchanged(fields, narrow, tmp_path):
    net = dataclasses.replace(network(classes=NAMES if fields.get("num_classes", 3) else None, **fields))
    net = dataclasses.replace(net, outputs="sigmoid")
    net.save(f"{tmp_path / 'v1.0'}/")
    back = load(tmp_path / "v1.0")
    for name in ("model", "preprocessing", "classes", "outputs"):
        assert getattr(back, name) == getattr(net, name), name
    assert_equal_trees(back.variables, net.variables)


@pytest.mark.parametrize(
    ("net", "what"),
    [
        (lambda: network(depth=16, conv1x1=True), "column C of the paper"),
        (lambda: network(pool_size=1, hidden=()), "the head with hidden=()"),
        (lambda: network(None), "a network without a stated preprocessing"),
        (lambda: network(dataclasses.replace(IMAGENET, crop=256)), "torchvision's head at 256 pixels"),
    ],
    ids=["C", "hidden", "preprocessing", "256"],
)
def test_our_own_shape_is_said_plainly(net, what, narrow_timm, tmp_path, capsys):
    net().save(tmp_path / "net")
    assert f"timm has no {what}: saved in the shape of vgg_jax, which timm does not read" in capsys.readouterr().err
    assert "timm has no name for this network" in (tmp_path / "net" / "README.md").read_text()
    with pytest.raises(KeyError, match="architecture"):
        narrow_timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "fields", [dict(in_chans=1), dict(num_classes=0, mlp_ratio=1 / 128)], ids=["gray", "no classes"]
)
def test_folders_of_timm_are_loaded(fields, safe, narrow_timm, tmp_path, capsys):
    torch.manual_seed(0)
    options = dict(num_classes=3, mlp_ratio=1 / 128, drop_rate=0.25) | fields
    theirs = narrow_timm.create_model("vgg13_bn", **options).eval()
    names = dict(label_names=list(NAMES)) if options["num_classes"] else {}
    args = dict(drop_rate=0.25)
    data = dict(crop_pct=0.9, img_size=96, mean=(0.4,) * theirs.in_chans, std=(0.3,) * theirs.in_chans)
    narrow_timm.models.save_for_hf(theirs, tmp_path, names, args, safe_serialization=safe, data_config=data)
    net = load(tmp_path)
    assert net.classes == (NAMES if names else None)
    assert net.model.dropout_rate == 0.25
    images = [image.convert("L" if theirs.in_chans == 1 else "RGB") for image in photographs(2)]
    assert relative_error(our_answers(net, images), timm_answers(narrow_timm, tmp_path, images)[1]) < 1e-5
    assert not capsys.readouterr().err
    assert load(tmp_path, features_only=True).model.num_classes is None


def folder_with(config, tmp_path, narrow_timm):
    """Return a folder of timm whose config.json has other fields; None removes one."""
    torch.manual_seed(0)
    theirs = narrow_timm.create_model("vgg11", num_classes=3, mlp_ratio=1 / 128)
    narrow_timm.models.save_for_hf(theirs, tmp_path, dict(label_names=NAMES), safe_serialization=True)
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text())
    cfg = stated["pretrained_cfg"] | config.pop("pretrained_cfg", {})
    path.write_text(json.dumps(stated | {"pretrained_cfg": cfg} | config))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (dict(architecture="resnet18"), "config.json states the architecture 'resnet18'; expected one of timm's vgg11"),
        (
            dict(architecture="vgg16"),
            "the architecture vgg16, and the weights are those of vgg11; expected one network",
        ),
        (dict(model_args=dict(global_pool="max")), "global_pool='max'; expected timm's VGG without it"),
        (dict(model_args=dict(act_layer="gelu")), "act_layer='gelu'; expected timm's VGG without it"),
        (dict(label_names=["cat"]), "label_names that do not fit the 3 classes"),
        (dict(label_names={"0": "cat", "1": "dog", "7": "cow"}), "label_names that do not fit the 3 classes"),
        (dict(pretrained_cfg=dict(mean=[124, 117, 104])), "config.json: the mean is (124.0, 117.0, 104.0)"),
    ],
    ids=["resnet", "vgg16", "pool", "activation", "one name", "gap", "mean"],
)
def test_config_of_another_network_is_refused(config, line, narrow_timm, tmp_path):
    folder = folder_with(config, tmp_path, narrow_timm)
    with raises_user_error(str(folder), line):
        load(folder)


def test_bicubic_interpolation_is_not_guessed(narrow_timm, tmp_path, capsys):
    net = load(folder_with(dict(pretrained_cfg=dict(interpolation="bicubic")), tmp_path, narrow_timm))
    assert net.preprocessing is None
    assert "bicubic interpolation, which vgg_jax has not; pass preprocessing" in capsys.readouterr().err


def test_edited_label_names_are_used(narrow, tmp_path, capsys):
    network().save(tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    path.write_text(path.read_text().replace('"dog"', '"wolf"'))
    assert load(tmp_path / "net").classes == ("cat", "wolf", NAMES[2])
    assert "other label names than model.safetensors: those of config.json are used" in capsys.readouterr().err


def test_folder_with_files_is_left_alone(narrow, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with raises_user_error(f"{tmp_path} holds notes.txt; expected an empty folder or none"):
        network().save(tmp_path)
    with raises_user_error("does not exist; create it first"):
        network().save(tmp_path / "missing" / "net")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_failed_folder_leaves_nothing(narrow, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with raises_user_error("No space left on device; choose a folder that can be written"):
        network().save(tmp_path / "net")
    assert os.listdir(tmp_path) == []


def test_damaged_config_is_one_line(narrow, tmp_path):
    network().save(tmp_path / "net")
    for content in ("{", "[]", '{"pretrained_cfg": 3}', ""):
        (tmp_path / "net" / "config.json").write_text(content)
        with raises_user_error("config.json is not timm's config.json", "download the folder again"):
            load(tmp_path / "net")


def test_card_states_what_the_network_carries(narrow, tmp_path):
    network(AUTHORS, batch_norm=True).save(tmp_path / "birds")
    card = (tmp_path / "birds" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\ntags:\n- image-classification")
    for line in (
        "# birds",
        "| network | VGG-11 (column A) with batch normalization |",
        '| classes | "cat", "dog", "güggel" |',
        "| images | short side 256, bilinear; center crop 224 |",
    ):
        assert line in card.splitlines(), line


def test_card_states_the_sha256_of_the_weights(narrow, tmp_path):
    network().save(tmp_path / "net")
    expected = hashlib.sha256((tmp_path / "net" / "model.safetensors").read_bytes()).hexdigest()
    card = (tmp_path / "net" / "README.md").read_text()
    assert f"| SHA-256 of model.safetensors | `{expected}` |" in card.splitlines()


MEASURED = Measured(
    dataset='Birds, the "small" copy',
    split="1,000 test images",
    accuracy={"one view": 0.91234, "with the horizontal flip": 0.92},
    command="python train.py --config birds.py",
    machine="one machine; jax 0.10.1",
    details={"license": "CC0-1.0"},
)


def test_hub_reads_the_figures_of_a_card(narrow, tmp_path):
    network().save(tmp_path / "net", measured=MEASURED)
    card = huggingface_hub.ModelCard((tmp_path / "net" / "README.md").read_text())
    assert card.data.library_name == "timm" and "vgg_jax" in card.data.tags
    first, second = card.data.eval_results
    assert (first.task_type, first.metric_type) == ("image-classification", "accuracy")
    assert (first.dataset_type, first.dataset_name) == ("birds", 'Birds, the "small" copy: 1,000 test images')
    assert (first.metric_value, first.metric_name) == (91.23, "accuracy, one view")
    assert (second.metric_value, second.metric_name) == (92, "accuracy, with the horizontal flip")
    for line in ("| accuracy, one view | 91.23% |", "| license | CC0-1.0 |", MEASURED.command):
        assert line in card.text.splitlines(), line


def test_card_and_figures_exclude_each_other(narrow, tmp_path):
    with raises_user_error("both a card and measured figures", "put the figures into the card"):
        network().save(tmp_path / "net", card="# Mine", measured=MEASURED)
    assert os.listdir(tmp_path) == []


def test_folder_section_of_the_page_runs(narrow_timm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network().save("vgg11.safetensors")
    found = run_page("hub.md", "vgg11-folder", "measured-folder")
    assert tuple(found["names"]) == found["same"].classes == NAMES


def test_timm_resizes_to_our_short_side():
    for resize in range(1, 600):
        for crop in (1, resize, resize // 2 + 1, resize * 7 // 8 + 1):
            if crop <= resize:
                assert math.floor(crop / crop_fraction(crop, resize)) == resize, (crop, resize)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [16, 19])
def test_timm_reads_folders_of_full_width(depth, timm, tmp_path):
    net = network(hidden=(4096, 4096), depth=depth, num_classes=1000, classes=None)
    net.save(tmp_path / "net")
    images = photographs(1)
    assert relative_error(our_answers(net, images), timm_answers(timm, tmp_path / "net", images)[1]) < 1e-5
