"""`evaluation.extraction`: values, resuming after SIGKILL, changed inputs, sources and file formats."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from tests.conftest import photographs, raises_user_error, random_variables, relative_error
from vgg_jax import IMAGENET, VGG, Network
from vgg_jax.evaluation import embedding_files, embeddings, extraction, parts
from vgg_jax.evaluation.embedding_files import load_embeddings
from vgg_jax.evaluation.extraction import extract
from vgg_jax.evaluation.image_sources import open_source
from vgg_jax.evaluation.pooled_features import FeatureOptions
from vgg_jax.weights.layouts import to_torch

pytestmark = pytest.mark.usefixtures("narrow")
MODEL = dict(depth=11, num_classes=10, pool_size=2, hidden=(24, 20))
VIEW = dataclasses.replace(IMAGENET, resize=36, crop=32)
OPTIONS = FeatureOptions(("fc7",))
SCALES = FeatureOptions(("pool5", "fc7"), scales=(64, 72), normalize=True)
SUFFIXES = (".npz", ".safetensors", ".parquet")


@pytest.fixture
def net(narrow):
    return network()


@functools.cache
def network():
    model = VGG(**MODEL)
    variables = jax.tree.map(np.asarray, random_variables(model, 64, 64, 3))
    for name in ("fc6", "fc7"):  # otherwise the features are almost equal
        variables["params"][name]["kernel"] = variables["params"][name]["kernel"] * 20
    return Network(model, variables, VIEW)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a folder of 40 photographs of two sizes."""
    images = tmp_path_factory.mktemp("originals")
    for i, image in enumerate(photographs(40)):
        image.resize((48, 40) if i % 3 else (40, 56)).save(images / f"{i:02d}.jpg")
    return images


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "images")


def run(net, source, path, options=OPTIONS, **more):
    """Extract to `path` in small batches."""
    more = {"batch_size": 1, **more}
    images = open_source(str(source), net.preprocessing, more.pop("split", None), more.pop("data_dir", ""))
    return extract(net.model, net.variables, net.preprocessing, images, options, str(path), **more)


class Stop(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch):
    """Return a function that extracts and stops after the first parts have been written."""

    def stop(net, source, path, options=OPTIONS):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "FLUSH_BYTES", 1)
            add = parts.PartFiles.add

            def add_some(self, start, rows):
                if start >= 16:
                    raise Stop
                add(self, start, rows)

            patch.setattr(parts.PartFiles, "add", add_some)
            with pytest.raises(Stop):
                run(net, source, path, options)

    return stop


def loads(path):
    return load_embeddings(path).features["fc7"]


def test_test_view_equals_the_network_itself(net, folder, tmp_path):
    layers = ("relu3_1", "pool5", "relu7")
    files = sorted(folder.iterdir())
    expected = net.features(np.stack([net.preprocess(file) for file in files]), layers)
    for pool, reduce in (("none", np.asarray), ("average", lambda x: x.mean((1, 2))), ("max", lambda x: x.max((1, 2)))):
        run(net, folder, tmp_path / f"{pool}.npz", FeatureOptions(layers, pool))
        found = load_embeddings(tmp_path / f"{pool}.npz")
        assert found.names == [file.name for file in files]
        for layer in layers:
            wanted = np.asarray(expected[layer])
            wanted = reduce(wanted) if wanted.ndim == 4 else wanted
            assert found.features[layer].shape == wanted.shape
            assert relative_error(found.features[layer], wanted) < 1e-5


def test_scales_equal_pytorch(net, folder, tmp_path, torchvision):
    """Appendix B in PyTorch, an image at a time: dense, flip, positions, scales, norm."""
    import torch

    scales, layers = (64, 80), ("pool4", "fc7")
    run(net, folder, tmp_path / "out.npz", FeatureOptions(layers, scales=scales, flip=True, normalize=True))
    state = {name: torch.from_numpy(np.array(array)) for name, array in to_torch(net.model, net.variables).items()}
    widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    trunk = torchvision.models.vgg.make_layers(widths)
    trunk.load_state_dict({name.removeprefix("features."): a for name, a in state.items() if "features" in name})
    fc6, fc7 = (state[f"classifier.{i}.weight"] for i in (0, 3))
    resize = {scale: torchvision.transforms.Resize(scale) for scale in scales}
    mean, std = (torch.tensor(values)[:, None, None] for values in (VIEW.mean, VIEW.std))

    def dense(image):
        x = (torchvision.transforms.functional.pil_to_tensor(image).float() / 255 - mean) / std
        with torch.no_grad():
            pool4 = trunk[:16](x[None])
            y = trunk[16:](pool4)
            y = torch.relu(torch.nn.functional.conv2d(y, fc6.reshape(24, 64, 2, 2), state["classifier.0.bias"]))
            y = torch.nn.functional.conv2d(y, fc7[..., None, None], state["classifier.3.bias"])
        return [maps.mean((2, 3))[0].numpy() for maps in (pool4, y)]

    found = load_embeddings(tmp_path / "out.npz")
    for row, file in list(enumerate(sorted(folder.iterdir())))[:6]:
        with PIL.Image.open(file) as image:
            views = [resize[scale](image) for scale in scales]
        views += [view.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for view in views]
        for layer, values in zip(layers, zip(*map(dense, views), strict=True), strict=True):
            expected = np.mean(values, 0)
            assert relative_error(found.features[layer][row], expected / np.linalg.norm(expected)) < 1e-4


@pytest.mark.slow
def test_stacked_scales_are_those_of_single_scales(net, folder, tmp_path):
    for name, choice in {"64": {"scales": (64,)}, "80": {"scales": (80,)}}.items():
        run(net, folder, tmp_path / f"{name}.npz", FeatureOptions(("fc7",), **choice))
    run(net, folder, tmp_path / "both.npz", FeatureOptions(("fc7",), scales=(64, 80), combine="stack"))
    expected = np.concatenate([loads(tmp_path / "64.npz"), loads(tmp_path / "80.npz")], 1)
    assert relative_error(loads(tmp_path / "both.npz"), expected) < 1e-5


KILLED = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import vgg_jax.model
from tests.narrow import NARROW_TABLE
vgg_jax.model.TABLE_1 = NARROW_TABLE
from vgg_jax.evaluation import parts
parts.FLUSH_BYTES = 1
flush = parts.PartFiles.flush
parts.PartFiles.flush = lambda self: (time.sleep(0.05), flush(self))
from vgg_jax.cli.extract import main
sys.exit(main(sys.argv[1:]))
"""


def test_sigkill_gives_the_same_file(net, folder, tmp_path):
    weights, out = tmp_path / "net.safetensors", tmp_path / "out.npz"
    net.save(weights)
    root = pathlib.Path(__file__).parent.parent.parent
    command = ["--weights", weights, "--layer", "fc7", "--batch-size", "1", folder, out]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, *map(str, command)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        while len(list((tmp_path / "out.npz.parts").glob("*.safetensors"))) < 2:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = len(list((tmp_path / "out.npz.parts").glob("*.safetensors")))
    assert not out.exists() and 2 <= kept < 5
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        add = parts.PartFiles.add
        patch.setattr(
            parts.PartFiles, "add", lambda self, start, rows: (computed.append(start), add(self, start, rows))
        )
        assert run(net, folder, out).computed
    assert len(computed) == 5 - kept
    run(net, folder, tmp_path / "never.npz")
    assert out.read_bytes() == (tmp_path / "never.npz").read_bytes()
    assert not (tmp_path / "out.npz.parts").exists()


@pytest.mark.parametrize("suffix, options", [(".npz", OPTIONS), (".safetensors", SCALES), (".parquet", SCALES)])
def test_resumed_file_has_the_same_bytes(net, folder, tmp_path, stopped, suffix, options):
    stopped(net, folder, tmp_path / f"out{suffix}", options)
    run(net, folder, tmp_path / f"out{suffix}", options)
    run(net, folder, tmp_path / f"never{suffix}", options)
    assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"never{suffix}").read_bytes()


def change_weights(net, folder):
    variables = jax.tree.map(np.array, net.variables)
    variables["params"]["conv1_1"]["bias"][0] += 1
    return dataclasses.replace(net, variables=variables), OPTIONS


def change_view(net, folder):
    return dataclasses.replace(net, preprocessing=dataclasses.replace(VIEW, resize=34)), OPTIONS


def change_layer(net, folder):
    return net, FeatureOptions(("relu7",))


def change_pool(net, folder):
    return net, FeatureOptions(("fc7",), pool="max")


def add_image(net, folder):
    PIL.Image.new("RGB", (40, 40)).save(folder / "new.png")
    return net, OPTIONS


def change_image(net, folder):
    PIL.Image.new("RGB", (40, 40)).save(folder / "00.jpg")
    return net, OPTIONS


CHANGES = {
    change_weights: "weights",
    change_view: "preprocessing",
    change_layer: "layers",
    change_pool: "view",
    add_image: "images",
    change_image: "images",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_input_is_named(net, folder, tmp_path, stopped, change, capsys):
    stopped(net, folder, tmp_path / "out.npz")
    run(net, folder, tmp_path / "complete.npz")
    new, options = change(net, folder)
    with raises_user_error(f"an unfinished extraction of other {CHANGES[change]};", "add --overwrite"):
        run(new, folder, tmp_path / "out.npz", options)
    with raises_user_error(f"exists and has features of other {CHANGES[change]};", "add --overwrite"):
        run(new, folder, tmp_path / "complete.npz", options)
    run(new, folder, tmp_path / "out.npz", options, overwrite=True)
    assert f"discarded an unfinished extraction of other {CHANGES[change]}" in capsys.readouterr().err
    run(new, folder, tmp_path / "new.npz", options)
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "new.npz").read_bytes()


def test_head_does_not_change_the_hash_of_the_trunk(net, folder, tmp_path):
    variables = jax.tree.map(np.array, net.variables)
    variables["params"]["fc8"]["bias"] += 1
    run(net, folder, tmp_path / "out.npz")
    assert not run(dataclasses.replace(net, variables=variables), folder, tmp_path / "out.npz").computed


def test_complete_file_is_not_computed_again(net, folder, tmp_path, monkeypatch):
    run(net, folder, tmp_path / "out.npz")
    monkeypatch.setattr(embeddings.Extraction, "compute", None)
    assert run(net, folder, tmp_path / "out.npz") == (str(tmp_path / "out.npz"), 40, 0, False)


def test_damaged_part_is_computed_again(net, folder, tmp_path, stopped, capsys):
    stopped(net, folder, tmp_path / "out.npz")
    damaged = sorted((tmp_path / "out.npz.parts").glob("*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    run(net, folder, tmp_path / "out.npz")
    assert "is damaged; its rows are computed again" in capsys.readouterr().err
    run(net, folder, tmp_path / "never.npz")
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "never.npz").read_bytes()


def test_second_process_is_refused(net, folder, tmp_path):
    store = parts.PartFiles(str(tmp_path / "out.npz.parts"), {})
    with raises_user_error("is in use by another process"):
        run(net, folder, tmp_path / "out.npz")
    store.close()


@pytest.mark.parametrize("options", [OPTIONS, SCALES], ids=["view", "scale"])
def test_unreadable_image_is_left_out(net, folder, tmp_path, options, capsys):
    (folder / "05.jpg").write_bytes(b"no image")
    content = (folder / "07.jpg").read_bytes()
    (folder / "07.jpg").write_bytes(content[: len(content) // 2])  # the header is intact
    found = run(net, folder, tmp_path / "out.npz", options)
    assert (found.images, found.unreadable) == (38, 2)
    assert "05.jpg: not a readable image: no format that Pillow can open" in capsys.readouterr().err
    names = load_embeddings(tmp_path / "out.npz").names
    assert len(names) == 38 and not {"05.jpg", "07.jpg"} & set(names)
    (folder / "05.jpg").unlink()
    (folder / "07.jpg").unlink()
    run(net, folder, tmp_path / "without.npz", options)
    assert relative_error(loads(tmp_path / "out.npz"), loads(tmp_path / "without.npz")) < 1e-5


def test_no_readable_image_is_refused(net, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with raises_user_error("images has no image that can be read; expected at least one: replace the files"):
        run(net, tmp_path / "images", tmp_path / "out.npz")


def test_class_folder_gives_labels_and_names(net, tmp_path):
    for split, names in (("train", ("cat", "dog")), ("test", ("dog",))):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i, image in enumerate(photographs(3)):
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    run(net, tmp_path / "data", tmp_path / "split.npz", split="train")
    run(net, tmp_path / "data" / "train", tmp_path / "folder.npz")
    for name in ("split", "folder"):
        found = load_embeddings(tmp_path / f"{name}.npz")
        assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert found.names == [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)]
        assert found.class_names == ("cat", "dog")
    run(net, tmp_path / "data", tmp_path / "test.npz", split="test")
    assert load_embeddings(tmp_path / "test.npz").labels.tolist() == [1, 1, 1]  # numbered as in training
    with raises_user_error("is a data set with splits: test, train", "add --split"):
        run(net, tmp_path / "data", tmp_path / "none.npz")


def test_tfds_split_gives_labels(data_dir, tmp_path, narrow):
    from vgg_jax.data.preprocessing import Preprocessing

    model = VGG(11, num_classes=10, pool_size=1, hidden=(), pool_after=(1, 2, 3, 4))
    view = Preprocessing(16, 16, (0.3,), (0.4,), "L")
    net = Network(model, random_variables(model, 16, 16, 1), view)
    options = FeatureOptions(("relu5_2",))
    run(net, "digits", tmp_path / "out.npz", options, split="test[:50]", data_dir=data_dir, batch_size=8)
    found = load_embeddings(tmp_path / "out.npz")
    assert found.features["relu5_2"].shape == (50, 64)
    assert len(set(found.names)) == 50
    assert set(found.labels) <= set(range(10)) and len(set(found.labels)) > 5


def test_formats_are_read_by_their_libraries(net, folder, tmp_path):
    import pyarrow.parquet

    options = FeatureOptions(("relu5_2", "fc7"), pool="none")
    for suffix in SUFFIXES:
        run(net, folder, tmp_path / f"out{suffix}", options)
    by_npz = dict(np.load(tmp_path / "out.npz"))
    by_safetensors = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    for layer, shape in (("relu5_2", (40, 2, 2, 64)), ("fc7", (40, 20))):
        assert by_npz[layer].shape == shape
        np.testing.assert_array_equal(by_safetensors[layer], by_npz[layer])
        np.testing.assert_array_equal(np.reshape(table[layer].to_pylist(), shape).astype(np.float32), by_npz[layer])
        for suffix in SUFFIXES:
            found = load_embeddings(tmp_path / f"out{suffix}")
            np.testing.assert_array_equal(found.features[layer], by_npz[layer])
            assert found.names == by_npz["names"].tolist() == table["name"].to_pylist()
            assert found.labels is None


def test_names_beyond_ascii_survive(net, tmp_path):
    (tmp_path / "images").mkdir()
    names = ["a.png", "früh.png", "写真" * 20 + ".png"]
    for name in names:
        PIL.Image.new("RGB", (40, 40)).save(tmp_path / "images" / name)
    for suffix in SUFFIXES:
        run(net, tmp_path / "images", tmp_path / f"out{suffix}")
        assert load_embeddings(tmp_path / f"out{suffix}").names == names


def test_network_gives_features_of_paths(net, folder):
    files = sorted(folder.iterdir())
    expected = np.asarray(net.features(np.stack([net.preprocess(file) for file in files]), "pool5")["pool5"])
    for paths in (folder, [str(file) for file in files], files[0]):
        found = net.features(paths, "pool5")["pool5"]
        assert relative_error(found, expected[: len(found)]) < 1e-5
    assert net.embeddings(folder, "pool5", pool="max").features["pool5"].shape == (40, 64)
    (folder / "03.jpg").write_bytes(b"no image")
    with raises_user_error("03.jpg: not a readable image"):
        net.features(folder, "pool5")
    assert len(net.embeddings(folder, "pool5").names) == 39


@pytest.mark.slow
def test_bfloat16_network_gives_float32_features(net, folder, tmp_path):
    half = dataclasses.replace(net, model=net.model.clone(dtype="bfloat16"))
    run(half, folder, tmp_path / "half.npz")
    run(net, folder, tmp_path / "out.npz")
    assert loads(tmp_path / "half.npz").dtype == np.float32
    assert relative_error(loads(tmp_path / "half.npz"), loads(tmp_path / "out.npz")) < 0.05


def test_full_disk_keeps_what_was_computed(net, folder, tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "write_embeddings", embedding_files.write_embeddings)
        patch.setitem(embedding_files.FORMATS, ".npz", (fail, *embedding_files.FORMATS[".npz"][1:]))
        with raises_user_error("No space left on device; free disk space, then rerun to resume"):
            run(net, folder, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    monkeypatch.setattr(parts.PartFiles, "add", None)  # nothing is computed again
    assert run(net, folder, tmp_path / "out.npz").images == 40
