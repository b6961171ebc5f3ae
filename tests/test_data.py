"""From TFDS records on disk to batches on the devices."""

import dataclasses
import functools
import io
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from jax.sharding import Mesh

from tests.archives import encoded
from tests.conftest import photographs, raises_user_error, write_cifar10, write_tfds
from tests.test_train_command import ROOT
from vgg_jax.config import Config, DataConfig
from vgg_jax.data import digits, pipeline
from vgg_jax.data.order import alternating_flips, permutation, train_indices
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import Split, check_config, open_split, open_splits


def mesh(devices=1):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def digits_config(data_dir, **fields):
    return DataConfig(dataset="digits", data_dir=data_dir, mean=(0.3,), std=(0.3,), **fields)


def to_numpy(batches):
    return [{key: np.asarray(array) for key, array in batch.items()} for batch in batches]


def assert_equal_batches(a, b):
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


# --- the digits


def test_digits_are_scikit_learns_split_in_two(data_dir):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    seen = {}
    for split, size in (("train", 1437), ("test", 360)):
        records = open_split(digits_config(data_dir), split).records
        assert len(records) == size
        for record in records:
            index = int(record["id"].decode().removeprefix("digit_"))
            assert index not in seen
            seen[index] = split
            if index % 100 == 0:
                image = np.asarray(PIL.Image.open(io.BytesIO(record["image"])))
                np.testing.assert_array_equal(image, np.round(bunch.images[index] * 255 / 16))
                assert record["label"] == bunch.target[index]
    assert len(seen) == 1797
    test = [i for i, split in seen.items() if split == "test"]
    share = np.bincount(bunch.target[test]) / np.bincount(bunch.target)
    np.testing.assert_allclose(share, 360 / 1797, atol=0.003)  # stratified: within half an image of 180
    # The split is fixed: these are its first images on every machine.
    assert sorted(test)[:8] == [21, 24, 28, 34, 35, 37, 39, 42]


def test_prepared_digits_need_no_scikit_learn(data_dir, monkeypatch, tmp_path):
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert len(open_split(digits_config(data_dir), "test")) == 360
    with raises_user_error("scikit-learn", "pip install scikit-learn", str(tmp_path)):
        open_split(digits_config(str(tmp_path)), "test")


def rename_but_the_last(source, target):
    if target.endswith("1.0.0"):
        raise KeyboardInterrupt
    os.replace(source, target)


def test_a_stopped_preparation_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:  # at the very last moment
        broken.setattr(os, "rename", rename_but_the_last)
        with pytest.raises(KeyboardInterrupt):
            digits.prepare(str(tmp_path))
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(open_split(digits_config(str(tmp_path)), "test")) == 360
    assert set(os.listdir(tmp_path / "digits")) == {"1.0.0", ".1.0.0.lock"}


# --- which examples, in which order


def test_selecting_classes_and_a_number_of_each(data_dir):
    config = Config(data=digits_config(data_dir, classes=(5, 7), images_per_class=4), seed=3)
    train_split, eval_split = open_splits(config)
    whole_train, whole_eval = (open_split(config.data, name) for name in ("train", "test"))
    labels = np.array([whole_train.test_view(i)[1] for i in range(len(whole_train))])
    assert sorted(label for _, label in map(train_split.test_view, range(len(train_split)))) == [5] * 4 + [7] * 4
    chosen = [train_split.records[i]["id"] for i in range(8)]
    all_ids = [record["id"] for record in whole_train.records]
    assert set(chosen) < {all_ids[i] for i in np.flatnonzero(np.isin(labels, (5, 7)))}
    assert [eval_split.records[i]["id"] for i in range(len(eval_split))] == [
        record["id"] for record in whole_eval.records if record["label"] in (5, 7)
    ]
    # The seed draws them, and alone.
    again, other = (open_splits(dataclasses.replace(config, seed=seed))[0] for seed in (3, 4))
    assert [again.records[i]["id"] for i in range(8)] == chosen
    assert [other.records[i]["id"] for i in range(8)] != chosen


def test_permutation_is_a_pure_function_of_seed_and_epoch():
    assert sorted(permutation(0, 0, 1000)) == list(range(1000))
    permutation.cache_clear()
    # Philox's raw bits are fixed for ever, and so is this order.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    orders = {tuple(permutation(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_an_epoch_takes_every_example_once_but_the_incomplete_batch():
    taken = np.concatenate([train_indices(3, step, 32, 100) for step in range(3, 6)])
    assert len(set(taken)) == len(taken) == 96
    np.testing.assert_array_equal(taken, permutation(3, 1, 100)[:96])


def test_a_batch_in_parts_has_the_examples_of_the_whole():
    """Of 100 examples three batches of 30 make an epoch, and so do nine steps of 10, though ten would fit."""
    for step in range(7):
        parts = [train_indices(3, 3 * step + i, 10, 100, parts=3) for i in range(3)]
        np.testing.assert_array_equal(np.concatenate(parts), train_indices(3, step, 30, 100))


def test_alternating_flips_mirror_each_image_in_every_other_epoch():
    n, size = 100, 30
    seen = np.full((4, n), -1)
    for step in range(12):
        seen[step // 3, train_indices(0, step, size, n)] = alternating_flips(0, step, size, n)
    both = (seen[0] >= 0) & (seen[1] >= 0)
    assert both.sum() > 60
    assert (seen[0] + seen[1])[both].tolist() == [1] * both.sum()
    for epoch in (0, 1):
        again = (seen[epoch] >= 0) & (seen[epoch + 2] >= 0)
        np.testing.assert_array_equal(seen[epoch][again], seen[epoch + 2][again])
        assert 0.3 < seen[epoch][seen[epoch] >= 0].mean() < 0.7
    parts = [alternating_flips(0, 3 * 4 + i, 10, n, parts=3) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), alternating_flips(0, 4, 30, n))
    assert (alternating_flips(0, 0, size, n) != alternating_flips(1, 0, size, n)).any()


@pytest.mark.parametrize("resident", [True, False])
def test_the_loader_mirrors_those_images(data_dir, resident):
    plain, mirrored = (
        to_numpy(
            Loader(
                open_split(digits_config(data_dir, alternating_flip=alternating), "train"), mesh(), resident
            ).train_batches(0, 100, range(13, 16))
        )
        for alternating in (False, True)
    )
    for i, step in enumerate(range(13, 16)):  # across the end of an epoch of 14
        flips = alternating_flips(0, step, 100, 1437)
        expected = np.where(flips[:, None, None, None], plain[i]["image"][:, :, ::-1], plain[i]["image"])
        np.testing.assert_array_equal(mirrored[i]["image"], expected)
        assert 0 < flips.sum() < 100


STEPS = range(5, 25)  # across the ends of epochs of 7 steps
VIEWS = {"pad_crop": {}, "scale_crop": dict(train_view="scale_crop", image_size=16, resize=16, train_scale=(18, 30))}


@functools.cache
def reference_batches(data_dir, view):
    """Twenty batches, streamed by the calling thread itself to one device."""
    split = open_split(digits_config(data_dir, num_threads=0, **VIEWS[view]), "train")
    return to_numpy(Loader(split, mesh(), resident=False).train_batches(7, 200, STEPS))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batches_are_the_same_for_all_threads_and_devices(data_dir, view, threads, devices):
    expected = reference_batches(data_dir, view)
    assert (expected[0]["image"].dtype, expected[0]["label"].dtype) == (np.uint8, np.int32)
    split = open_split(digits_config(data_dir, num_threads=threads, **VIEWS[view]), "train")
    assert_equal_batches(to_numpy(Loader(split, mesh(devices), resident=False).train_batches(7, 200, STEPS)), expected)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_resident_batches_are_the_streamed_ones(data_dir, devices):
    loader = Loader(open_split(digits_config(data_dir), "train"), mesh(devices), resident=True)
    assert_equal_batches(to_numpy(loader.train_batches(7, 200, STEPS)), reference_batches(data_dir, "pad_crop"))


@pytest.mark.parametrize(("view", "resident"), [("pad_crop", False), ("pad_crop", True), ("scale_crop", False)])
def test_batches_of_a_run_resumed_anywhere_are_those_of_the_whole(data_dir, view, resident):
    loader = Loader(open_split(digits_config(data_dir, **VIEWS[view]), "train"), mesh(), resident=resident)
    whole = reference_batches(data_dir, view)
    for start in STEPS:
        resumed = loader.train_batches(7, 200, range(start, min(start + 2, STEPS.stop)))
        assert_equal_batches(to_numpy(resumed), whole[start - STEPS.start :][:2])


PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from tests.test_data import STEPS, VIEWS, digits_config
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import open_split
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices()), ("data",))
arrays = {}
for view, resident in (("pad_crop", True), ("pad_crop", False), ("scale_crop", False)):
    loader = Loader(open_split(digits_config(sys.argv[3], **VIEWS[view]), "train"), mesh, resident=resident)
    for i, batch in enumerate(loader.train_batches(7, 200, STEPS)):
        for key, array in batch.items():
            for shard in array.addressable_shards:
                arrays[f"{view} {resident} {i} {key} {shard.index[0].start}"] = np.asarray(shard.data)
np.savez(sys.argv[4], **arrays)
"""


def test_batches_of_two_processes_are_those_of_one(data_dir, tmp_path):
    """Each reads only its own part; together they have every row of every batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), data_dir, file], cwd=ROOT, stderr=subprocess.PIPE
        )
        for i, file in enumerate(files)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    parts = [dict(np.load(file)) for file in files]
    assert not set(parts[0]) & set(parts[1])
    merged = {**parts[0], **parts[1]}
    for view, resident in (("pad_crop", True), ("pad_crop", False), ("scale_crop", False)):
        batches = [
            {
                key: np.concatenate([merged[f"{view} {resident} {i} {key} {start}"] for start in range(0, 200, 25)])
                for key in ("image", "label")
            }
            for i in range(len(STEPS))
        ]
        assert_equal_batches(batches, reference_batches(data_dir, view))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluation_sees_every_example_exactly_once(data_dir, batch_size, resident):
    config = digits_config(data_dir)
    split = open_split(config, "test")
    batches = to_numpy(Loader(split, mesh(8), resident=resident).eval_batches(batch_size))
    assert sum(batch["weight"].sum() for batch in batches) == 360
    counted = np.concatenate([batch["image"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.stack([split.test_view(i)[0] for i in range(360)]))


# --- TFDS data sets of others


def test_cifar10_as_tfds_writes_it(tmp_path):
    write_cifar10(str(tmp_path), num_train=20, num_test=10)
    split = open_split(DataConfig(data_dir=str(tmp_path)), "train")
    assert (len(split), split.num_classes, split.channels) == (20, 10, 3)
    image, label = split.test_view(3)
    assert (image.shape, image.dtype, label) == ((32, 32, 3), np.uint8, 3)


JPEG = functools.partial(encoded, quality=95)


def write_photographs(data_dir, files, validation=5):
    """An `imagenet2012` of these files, the first of them for validation too."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    examples = [{"image": file, "label": 80 * i % 1000, "file_name": f"{i}.JPEG"} for i, file in enumerate(files)]
    splits = {"train": examples, "validation": examples[:validation]}
    write_tfds(str(data_dir), "imagenet2012", "5.1.0", features, splits)


def photographs_config(data_dir, **fields):
    return DataConfig("imagenet2012", str(data_dir), **{"image_size": 224, "resize": 256, **fields})


def test_imagenet_is_streamed_as_random_resized_crops(tmp_path):
    """JPEGs of any size: 224x224 crops, another of the same photograph in the next epoch."""
    write_photographs(tmp_path, map(JPEG, photographs(12)))
    config = photographs_config(tmp_path, train_view="random_resized_crop")
    split = open_split(config, "train")
    assert (split.num_classes, split.channels) == (1000, 3)
    whole = to_numpy(Loader(split, mesh()).train_batches(0, 4, range(6)))
    assert whole[0]["image"].shape == (4, 224, 224, 3)
    first_epoch, second_epoch = (np.concatenate([b["label"] for b in whole[i : i + 3]]) for i in (0, 3))
    assert sorted(first_epoch) == sorted(second_epoch) == [80 * i for i in range(12)]
    position = int(np.flatnonzero(second_epoch == first_epoch[0])[0])
    assert (whole[0]["image"][0] != whole[3 + position // 4]["image"][position % 4]).mean() > 0.5

    evaluation = to_numpy(Loader(open_split(config, "validation"), mesh()).eval_batches(3))
    assert [batch["weight"].tolist() for batch in evaluation] == [[1, 1, 1], [1, 1, 0]]


def test_the_same_image_is_cropped_anew_in_each_epoch(tmp_path):
    """Here an epoch is one image, always in the same row of its batch."""
    write_photographs(tmp_path, map(JPEG, photographs(1)))
    config = photographs_config(tmp_path, train_view="random_resized_crop")
    images = [b["image"] for b in to_numpy(Loader(open_split(config, "train"), mesh()).train_batches(0, 1, range(5)))]
    assert len(np.unique(np.stack(images), axis=0)) == 5


# --- images that cannot be used, and files that are damaged


def odd_files():
    """Twelve files: seven of unusual but readable images, then good JPEGs; the fourth and the ninth are corrupt."""
    photos = photographs(12)
    grey = np.asarray(photos[4].convert("L"))
    files = [
        encoded(photos[0].convert("CMYK")),
        encoded(photos[1], "PNG"),
        encoded(photos[2].convert("LA"), "PNG"),
        JPEG(photos[3])[:2000],
        encoded(PIL.Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        encoded(photos[5].convert("L")),
        encoded(photos[6].convert("RGBA"), "PNG"),
        *map(JPEG, photos[7:]),
    ]
    files[8] = b""
    return files


CORRUPT = (3, 8)


@pytest.mark.parametrize("train_view", ["pad_crop", "random_resized_crop"])
def test_unusual_images_become_rgb_and_a_corrupt_one_is_named(tmp_path, train_view):
    write_photographs(tmp_path, odd_files())
    split = open_split(photographs_config(tmp_path, train_view=train_view), "train")
    view = split.test_view if train_view == "pad_crop" else lambda i: split.random_view(i, 0, i)
    for i in range(len(split)):
        if i in CORRUPT:
            with raises_user_error(f"imagenet2012/train, example {i} ({i}.JPEG)", f"record {i}", "cannot be decoded"):
                view(i)
        else:
            image, label = view(i)
            assert (image.shape, image.dtype, label) == ((224, 224, 3), np.uint8, 80 * i)
            assert image.std() > 10  # a photograph, not a blank
    loader = Loader(split, mesh(), resident=False)
    with raises_user_error("(3.JPEG)", "leave such images out with --config.data.corrupt_images=skip"):
        to_numpy(loader.eval_batches(12))


def test_corrupt_images_are_skipped_on_request(tmp_path, capsys):
    """Others take their place in training; an evaluation counts the rest; each is told of once."""
    write_photographs(tmp_path, odd_files(), validation=12)
    config = photographs_config(tmp_path, corrupt_images="skip")
    streamed, resident = (Loader(open_split(config, "train"), mesh(), resident=r) for r in (False, True))
    batches = to_numpy(streamed.train_batches(0, 4, range(9)))
    assert_equal_batches(batches, to_numpy(resident.train_batches(0, 4, range(9))))
    labels = np.concatenate([batch["label"] for batch in batches])
    replaced = [80 * (i + 1 if i in CORRUPT else i) for step in range(9) for i in train_indices(0, step, 4, 12)]
    assert labels.tolist() == replaced
    said = capsys.readouterr().err
    for i in CORRUPT:
        assert said.count(f"example {i} ({i}.JPEG)") == 2  # once by each loader
    assert "the 2. corrupt image" in said

    for loader in (streamed, resident):
        evaluation = to_numpy(loader.eval_batches(5))
        weights = np.concatenate([batch["weight"] for batch in evaluation])
        assert weights.tolist() == [i not in CORRUPT for i in range(12)] + [0] * 3


def test_too_many_corrupt_images_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MOST_CORRUPT", 1)
    write_photographs(tmp_path, odd_files())
    split = open_split(photographs_config(tmp_path, corrupt_images="skip"), "train")
    with raises_user_error("imagenet2012/train has more than 1 corrupt images; replace them; the last:", ".JPEG"):
        Loader(split, mesh(), resident=True)


@pytest.mark.parametrize("damage", ["cut short", "empty", "a byte flipped", "missing"])
def test_a_damaged_file_is_named_with_the_record(tmp_path, damage):
    write_cifar10(str(tmp_path), num_train=40, num_test=10)
    (path,) = (tmp_path / "cifar10" / "3.0.2").glob("*train.array_record*")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:20_000] + bytes([data[20_000] ^ 1]) + data[20_001:]
        path.write_bytes({"cut short": data[: len(data) // 2], "empty": b"", "a byte flipped": flipped}[damage])
    split = open_split(DataConfig(data_dir=str(tmp_path)), "train")
    with raises_user_error(f"{path}, record ", "cannot be read, the file is damaged", "prepare the data set again"):
        Loader(split, mesh())
    with raises_user_error(f"{path}, record "):
        to_numpy(Loader(split, mesh(), resident=False).train_batches(0, 8, range(5)))


def test_threads_read_two_batches_ahead_and_no_further(data_dir, monkeypatch):
    """So that the memory of the host is bounded: those of the threads, and those that are placed already."""
    read = []
    whole = Split.test_view
    monkeypatch.setattr(Split, "test_view", lambda self, i: (read.append(i), whole(self, i))[1])
    loader = Loader(open_split(digits_config(data_dir, num_threads=4), "train"), mesh(), resident=False)
    batches = loader.train_batches(0, 16, range(1000))
    next(batches)
    time.sleep(1)
    batches.close()
    assert 16 < len(read) <= 16 * (1 + pipeline.BATCHES_AHEAD + 2 + 1)


def test_unknown_and_unprepared_data_sets_are_named(tmp_path):
    with raises_user_error("'cifar11'", str(tmp_path)):
        open_split(DataConfig(dataset="cifar11", data_dir=str(tmp_path)), "train")
    with raises_user_error("imagenette", str(tmp_path), "python -m vgg_jax.prepare imagenette --data-dir"):
        open_split(DataConfig(dataset="imagenette", data_dir=str(tmp_path)), "train")


def test_missing_split_lists_those_there_are(data_dir):
    with raises_user_error("'validation'", "train (1437), test (360)"):
        open_split(digits_config(data_dir), "validation")


def test_labels_out_of_range_are_found(data_dir):
    config = digits_config(data_dir)
    split = open_split(config, "test")
    object.__setattr__(split, "num_classes", 9)
    with raises_user_error("digits/test, example", "record ", "label 9; expected 0 up to 8"):
        Loader(split, mesh())
    with raises_user_error("digits/test, example", "label 9; expected 0 up to 8"):
        to_numpy(Loader(split, mesh(), resident=False).train_batches(0, 100, range(4)))


def test_configuration_against_data_and_devices(data_dir):
    config = Config(data=digits_config(data_dir), batch_size=100)
    train, test = open_split(config.data, "train"), open_split(config.data, "test")
    check_config(config, train, test, 4)
    with raises_user_error("batch_size is 100", "the nearest are 96 and 104"):
        check_config(config, train, test, 8)
    config.accumulation_steps = 4
    with raises_user_error(
        "batch_size is 100", "a multiple of 32, for 8 devices in 4 steps: the nearest are 96 and 128"
    ):
        check_config(config, train, test, 8)
    config.accumulation_steps = 1
    config.shard_head, config.model.hidden = True, (60,)
    with raises_user_error("config.shard_head divides", "inputs, 512, 60, among 8 devices"):
        check_config(config, train, test, 8)
    config.shard_head = False
    config.batch_size = 2000
    with raises_user_error("expected at most 1437"):
        check_config(config, train, test, 1)
    config.batch_size, config.model.num_classes = 4, 5
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    with raises_user_error("expected at least 10, the classes of digits/train", "expected 1, as the images"):
        check_config(config, train, test, 1)


def test_a_part_of_a_split(data_dir):
    whole, first, rest = (open_split(digits_config(data_dir), f"train{part}") for part in ("", "[:90%]", "[90%:]"))
    assert len(first) + len(rest) == len(whole)
    assert rest.records.locate(5).endswith(f"record {len(first) + 5}")
    np.testing.assert_array_equal(rest.test_view(5)[0], whole.test_view(len(first) + 5)[0])
    for part in ("train[:0]", "train[90%:10%]", "train[x]"):
        with raises_user_error(f"split '{part}' of digits/1.0.0 is missing or empty"):
            open_split(digits_config(data_dir), part)


# --- nothing is left behind

MEMORY = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from tests.test_data import photographs_config
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import open_split
config = photographs_config(sys.argv[1], image_size=32, resize=32, train_view="random_resized_crop")
loader = Loader(open_split(config, "train"), Mesh(np.array(jax.devices()), ("data",)))
num_batches, sizes = int(sys.argv[2]), []
for i, batch in enumerate(loader.train_batches(0, 8, range(num_batches))):
    if i % (num_batches // 100) == 0:
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * 4096)
slope, _ = np.polyfit(np.linspace(0, 1, 80), sizes[20:], 1)  # over all but the first fifth
print(slope / sizes[-1])
"""


# The allocator's pools fill during the first 2,000 batches; one batch kept of each would be 10 % after 1,000.
@pytest.mark.parametrize(("num_batches", "most"), [(1000, 0.03), pytest.param(10_000, 0.01, marks=pytest.mark.grid)])
def test_memory_stays_flat(tmp_path, num_batches, most):
    write_photographs(tmp_path, [JPEG(photo.resize((48, 40))) for photo in photographs(32)])
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, str(num_batches)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert abs(float(process.stdout)) < most


def test_closed_batches_leave_no_thread(tmp_path):
    write_photographs(tmp_path, map(JPEG, photographs(12)))
    split = open_split(photographs_config(tmp_path, train_view="random_resized_crop"), "train")
    before = threading.active_count()
    batches = Loader(split, mesh()).train_batches(0, 4, range(10**6))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
