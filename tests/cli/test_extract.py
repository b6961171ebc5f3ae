"""`python -m vgg_jax extract` and `probe`."""

import json
import sys

import numpy as np
import pytest

from tests.conftest import photographs, random_variables
from vgg_jax import VGG, Network
from vgg_jax.cli import extract, probe
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation.embedding_files import load_embeddings

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def weights(narrow, tmp_path):
    model = VGG(11, num_classes=10, pool_size=1, hidden=(16, 16))
    path = tmp_path / "net.safetensors"
    Network(model, random_variables(model, 32, 32, 3), Preprocessing(32, 32)).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """Return a folder SPLIT/CLASS/IMAGE of two classes that differ in brightness."""
    for split, count in (("train", 10), ("test", 5)):
        for name, factor in (("bright", 1.0), ("dark", 0.2)):
            directory = tmp_path / "data" / split / name
            directory.mkdir(parents=True)
            for i, image in enumerate(photographs(count, seed=len(split))):
                image.resize((40, 32)).point(lambda value, factor=factor: value * factor).save(directory / f"{i}.png")
    return tmp_path / "data"


def run(command, capsys, *arguments):
    code = command.main([*map(str, arguments)])
    return code, capsys.readouterr()


def test_probe_of_extracted_splits(weights, data, tmp_path, capsys):
    for split in ("train", "test"):
        arguments = ("--weights", weights, "--layer", "pool1,pool5", "--scales", "32,48", "--split", split)
        code, printed = run(extract, capsys, data, tmp_path / f"{split}.npz", *arguments)
        assert code == 0
        assert printed.out.splitlines()[-1].startswith(f"features of {20 if split == 'train' else 10} images: ")
    found = load_embeddings(tmp_path / "test.npz")
    assert found.description["view"] == {
        **{"pool": "average", "scales": [32, 48], "combine": "average", "flip": True, "normalize": True}
    }
    np.testing.assert_allclose(np.linalg.norm(found.features["pool1"], axis=1), 1, rtol=1e-6)
    arguments = (tmp_path / "train.npz", tmp_path / "test.npz", "--layer", "pool1")
    code, printed = run(probe, capsys, *arguments, "--json")
    result = json.loads(printed.out)
    assert code == 0 and result["total"] == 10 and result["accuracy"] >= 0.8
    assert result["interval"][0] < result["accuracy"]
    code, printed = run(probe, capsys, *arguments, "--per-class", "--C", 1)
    assert [line.split()[-1] for line in printed.out.splitlines()[2:]] == ["bright", "dark"]


def test_unreadable_image_gives_exit_code_1(weights, data, tmp_path, capsys):
    folder = data / "test" / "dark"
    (folder / "broken.jpg").write_bytes(b"no image")
    code, printed = run(extract, capsys, folder, tmp_path / "out.npz", "--weights", weights, "--layer", "relu7")
    assert code == 1
    assert "features of 5 images, 1 unreadable" in printed.out
    assert "broken.jpg: not a readable image" in printed.err
    code, printed = run(extract, capsys, folder, tmp_path / "out.npz", "--weights", weights, "--layer", "relu7")
    assert code == 1 and "complete before; nothing to compute" in printed.out


def test_log_has_plain_lines_of_progress(weights, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vgg_jax.console.LOG_SECONDS", 0)
    folder = data / "train" / "dark"
    code, printed = run(extract, capsys, folder, tmp_path / "out.npz", "--weights", weights, "--layer", "pool5")
    assert code == 0
    assert "extraction: 7 of 10 images" in printed.out.splitlines()
    assert "\r" not in printed.out + printed.err


def test_mistakes_give_one_line_and_exit_code_2(weights, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no features")
    images = data / "test" / "dark"
    for source, out, arguments, part in (
        (images, "out.txt", (), "ends in .txt; expected one of .npz, .safetensors, .parquet"),
        (images, "missing/out.npz", (), "missing is missing or cannot be written"),
        (images, "text.npz", (), "is damaged or was not written by vgg-jax extract"),
        (images, "out.npz", ("--layer", "fc9"), "found no layer fc9; expected some of conv1_1"),
        (images, "out.npz", ("--scales", "small"), "--scales is small; expected numbers of pixels"),
        (images, "out.npz", ("--scales", "16"), "the smallest scale is 16; expected 32 or more pixels for pool5"),
        (images, "out.npz", ("--pool", "none", "--flip"), "pool is 'none', which keeps maps"),
        (images, "out.npz", ("--combine", "stack"), "expected two or more scales"),
        (images, "out.npz", ("--batch-size", "0"), "--batch-size is 0; expected 1 or more"),
        (tmp_path / "nowhere", "out.npz", (), "nowhere does not exist"),
        (tmp_path / "empty", "out.npz", (), "is a folder without images"),
        (data, "out.npz", (), "is a data set with splits: test, train; expected one to read: add --split"),
    ):
        layer = () if "--layer" in arguments else ("--layer", "pool5")
        code, printed = run(extract, capsys, source, tmp_path / out, "--weights", weights, *layer, *arguments)
        (error,) = printed.err.splitlines()
        assert code == 2 and part in error
        assert not (tmp_path / "out.npz").exists() and not (tmp_path / "out.npz.parts").exists()


@pytest.mark.parametrize("module, suffix", [("pyarrow", ".parquet"), ("sklearn", ".npz")])
def test_missing_extra_gives_the_pip_command(weights, data, tmp_path, capsys, monkeypatch, module, suffix):
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / f"out{suffix}"
    if module == "sklearn":
        code, printed = run(probe, capsys, out, out)
    else:
        code, printed = run(extract, capsys, data, out, "--weights", weights, "--layer", "pool5", "--split", "test")
    assert code == 2
    (error,) = printed.err.splitlines()
    assert error.endswith("pip install 'vgg_jax[extract]'")
