"""Batches on the devices: the same for all threads, devices, processes and restarts."""

import functools
import itertools
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tests.cli.test_train import ROOT
from tests.conftest import photographs, raises_user_error
from tests.data.common import (
    CORRUPT,
    RANDOM_CROPS,
    assert_equal_batches,
    jpeg,
    mesh,
    odd_files,
    open_digits,
    open_photographs,
    to_numpy,
    write_photographs,
)
from vgg_jax.data import loader as pipeline
from vgg_jax.data.dataset import Split
from vgg_jax.data.loader import Loader
from vgg_jax.data.resident import gathered
from vgg_jax.data.sampler import alternating_flips, train_indices
from vgg_jax.data.transforms import Views

STEPS = range(5, 25)  # across the ends of epochs of 7 steps
VIEWS = {"pad_crop": Views(), "scale_crop": Views(16, 16, "scale_crop", (18, 30))}


@functools.cache
def reference_batches(data_dir, view):
    """Return twenty batches that the calling thread itself has read."""
    split = open_digits(data_dir, views=VIEWS[view])

    def read(step):
        read_one = split.random_view if split.random_views else lambda index, *_: split.test_view(index)
        indices = train_indices(7, step, 200, len(split))
        images, labels = zip(*(read_one(int(i), 7, step * 200 + row) for row, i in enumerate(indices)), strict=True)
        return {"image": np.stack(images), "label": np.stack(labels)}

    return [read(step) for step in STEPS]


THREADS = [0, 1, 2, 60]  # 60: a task has fewer examples
SHORT_CELLS = {(0, 1), (1, 8), (2, 2), (60, 8)}
CELLS = [
    pytest.param(*cell, marks=() if cell in SHORT_CELLS else pytest.mark.slow)
    for cell in itertools.product(THREADS, [1, 2, 8])
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("threads", "devices"), CELLS)
def test_batches_do_not_depend_on_threads_and_devices(data_dir, view, threads, devices):
    expected = reference_batches(data_dir, view)
    assert (expected[0]["image"].dtype, expected[0]["label"].dtype) == (np.uint8, np.int32)
    loader = Loader(open_digits(data_dir, views=VIEWS[view]), mesh(devices), resident=False, num_threads=threads)
    assert_equal_batches(to_numpy(loader.train_batches(7, 200, STEPS)), expected)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_resident_batches_equal_streamed_ones(data_dir, devices):
    loader = Loader(open_digits(data_dir), mesh(devices), resident=True)
    assert_equal_batches(to_numpy(loader.train_batches(7, 200, STEPS)), reference_batches(data_dir, "pad_crop"))


@pytest.mark.parametrize(("view", "resident"), [("pad_crop", False), ("pad_crop", True), ("scale_crop", False)])
def test_batches_of_a_resumed_run_equal_those_of_the_whole(data_dir, view, resident):
    loader = Loader(open_digits(data_dir, views=VIEWS[view]), mesh(), resident=resident)
    whole = reference_batches(data_dir, view)
    for start in STEPS:
        resumed = loader.train_batches(7, 200, range(start, min(start + 2, STEPS.stop)))
        assert_equal_batches(to_numpy(resumed), whole[start - STEPS.start :][:2])


PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from tests.data.common import open_digits
from tests.data.test_loader import STEPS, VIEWS
from vgg_jax.data.loader import Loader
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices()), ("data",))
arrays = {}
for view, resident in (("pad_crop", True), ("pad_crop", False), ("scale_crop", False)):
    loader = Loader(open_digits(sys.argv[3], views=VIEWS[view]), mesh, resident=resident)
    for i, batch in enumerate(loader.train_batches(7, 200, STEPS)):
        for key, array in batch.items():
            for shard in array.addressable_shards:
                arrays[f"{view} {resident} {i} {key} {shard.index[0].start}"] = np.asarray(shard.data)
np.savez(sys.argv[4], **arrays)
"""


def test_batches_of_two_processes_equal_those_of_one(data_dir, tmp_path):
    """Each process reads only its own part; together they have every row of every batch."""
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
def test_loader_applies_the_alternating_flips(data_dir, resident):
    plain, flipped = (
        to_numpy(
            Loader(open_digits(data_dir), mesh(), resident=resident, alternating_flip=alternating).train_batches(
                0, 100, range(13, 16)
            )
        )
        for alternating in (False, True)
    )
    for i, step in enumerate(range(13, 16)):  # across the end of an epoch of 14
        flips = alternating_flips(0, step, 100, 1437)
        expected = np.where(flips[:, None, None, None], plain[i]["image"][:, :, ::-1], plain[i]["image"])
        np.testing.assert_array_equal(flipped[i]["image"], expected)
        assert 0 < flips.sum() < 100


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluation_sees_every_example_exactly_once(data_dir, batch_size, resident):
    split = open_digits(data_dir, "test")
    batches = to_numpy(Loader(split, mesh(8), resident=resident).eval_batches(batch_size))
    assert sum(batch["weight"].sum() for batch in batches) == 360
    counted = np.concatenate([batch["image"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.stack([split.test_view(i)[0] for i in range(360)]))


def test_imagenet_is_streamed_as_random_resized_crops(tmp_path):
    """JPEGs of any size become 224x224 crops; the next epoch has another crop of the same photograph."""
    write_photographs(tmp_path, map(jpeg, photographs(12)))
    split = open_photographs(tmp_path, views=RANDOM_CROPS)
    assert (split.num_classes, split.channels) == (1000, 3)
    whole = to_numpy(Loader(split, mesh()).train_batches(0, 4, range(6)))
    assert whole[0]["image"].shape == (4, 224, 224, 3)
    first_epoch, second_epoch = (np.concatenate([b["label"] for b in whole[i : i + 3]]) for i in (0, 3))
    assert sorted(first_epoch) == sorted(second_epoch) == [80 * i for i in range(12)]
    position = int(np.flatnonzero(second_epoch == first_epoch[0])[0])
    assert (whole[0]["image"][0] != whole[3 + position // 4]["image"][position % 4]).mean() > 0.5

    validation = open_photographs(tmp_path, "validation", RANDOM_CROPS)
    evaluation = to_numpy(Loader(validation, mesh()).eval_batches(3))
    assert [batch["weight"].tolist() for batch in evaluation] == [[1, 1, 1], [1, 1, 0]]


def test_each_epoch_crops_the_same_image_anew(tmp_path):
    """Here an epoch is one image, always in the same row of its batch."""
    write_photographs(tmp_path, map(jpeg, photographs(1)))
    loader = Loader(open_photographs(tmp_path, views=RANDOM_CROPS), mesh())
    images = [batch["image"] for batch in to_numpy(loader.train_batches(0, 1, range(5)))]
    assert len(np.unique(np.stack(images), axis=0)) == 5


def test_corrupt_images_are_skipped_on_request(tmp_path, capsys):
    """Training replaces a corrupt image by the next one; an evaluation counts the others; each is reported once."""
    write_photographs(tmp_path, odd_files(), validation=12)
    split = open_photographs(tmp_path)
    streamed, resident = (Loader(split, mesh(), resident=r, skip_corrupt=True) for r in (False, True))
    batches = to_numpy(streamed.train_batches(0, 4, range(9)))
    assert_equal_batches(batches, to_numpy(resident.train_batches(0, 4, range(9))))
    labels = np.concatenate([batch["label"] for batch in batches])
    replaced = [80 * (i + 1 if i in CORRUPT else i) for step in range(9) for i in train_indices(0, step, 4, 12)]
    assert labels.tolist() == replaced
    reported = capsys.readouterr().err
    for i in CORRUPT:
        assert reported.count(f"example {i} ({i}.JPEG)") == 2  # once by each loader
    assert "skipped corrupt image 2:" in reported

    for loader in (streamed, resident):
        evaluation = to_numpy(loader.eval_batches(5))
        weights = np.concatenate([batch["weight"] for batch in evaluation])
        assert weights.tolist() == [i not in CORRUPT for i in range(12)] + [0] * 3


def test_too_many_corrupt_images_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_CORRUPT_IMAGES", 1)
    write_photographs(tmp_path, odd_files())
    message = "imagenet2012/train has more than 1 corrupt images; replace them; the last one:"
    with raises_user_error(message, ".JPEG"):
        Loader(open_photographs(tmp_path), mesh(), resident=True, skip_corrupt=True)


def test_no_steps_give_no_batches(data_dir):
    loader = Loader(open_digits(data_dir), mesh(), resident=False)
    assert list(loader.train_batches(7, 200, range(5, 5))) == []


def test_a_task_of_a_thread_reads_several_examples(data_dir, monkeypatch):
    """Grain takes 0.15 ms of the interpreter for each task, which would bound the rate over all threads."""
    tasks = []
    whole = pipeline.Slots.fill
    monkeypatch.setattr(pipeline.Slots, "fill", lambda self, rows: (tasks.append(rows), whole(self, rows))[1])
    loader = Loader(open_digits(data_dir), mesh(), resident=False, num_threads=2)
    list(loader.train_batches(0, 64, range(3)))
    assert len(tasks) == 3 * 64 // pipeline.ROWS_PER_TASK


def test_automatic_threads_are_the_processors_at_hand(data_dir, monkeypatch):
    monkeypatch.setattr(pipeline, "num_processors", lambda: 5)
    split = open_digits(data_dir)
    assert [Loader(split, mesh(), resident=False, num_threads=n)._num_threads for n in (0, 3)] == [5, 3]


def test_threads_read_at_most_two_batches_ahead(data_dir, monkeypatch):
    """This bounds the memory of the host: batches of the threads, and batches that are already on the devices."""
    read = []
    whole = Split.test_view
    monkeypatch.setattr(Split, "test_view", lambda self, i: (read.append(i), whole(self, i))[1])
    loader = Loader(open_digits(data_dir), mesh(), resident=False, num_threads=4)
    batches = loader.train_batches(0, 16, range(1000))
    next(batches)
    time.sleep(1)
    batches.close()
    assert 16 < len(read) <= 16 * (1 + pipeline.BATCHES_AHEAD + 2 + 1)


MEMORY = """
import sys
import jax
import numpy as np
from tests.data.common import mesh, open_photographs
from vgg_jax.data.loader import Loader
from vgg_jax.data.transforms import Views
views = Views(32, 32, "random_resized_crop")
loader = Loader(open_photographs(sys.argv[1], views=views), mesh())
num_batches, sizes = int(sys.argv[2]), []
for i, batch in enumerate(loader.train_batches(0, 8, range(num_batches))):
    if i % (num_batches // 100) == 0:
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * 4096)
slope, _ = np.polyfit(np.linspace(0, 1, 80), sizes[20:], 1)  # over all but the first fifth
print(slope / sizes[-1])
"""


# The allocator's pools fill during the first 2,000 batches. Keeping one batch of each would be 10 % after 1,000.
@pytest.mark.slow
@pytest.mark.parametrize(("num_batches", "most"), [(1000, 0.03), (10_000, 0.01)])
def test_memory_stays_flat(tmp_path, num_batches, most):
    write_photographs(tmp_path, [jpeg(photo.resize((48, 40))) for photo in photographs(32)])
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, str(num_batches)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert abs(float(process.stdout)) < most


def test_closed_batches_leave_no_thread(tmp_path):
    write_photographs(tmp_path, map(jpeg, photographs(12)))
    split = open_photographs(tmp_path, views=RANDOM_CROPS)
    before = threading.active_count()
    batches = Loader(split, mesh()).train_batches(0, 4, range(10**6))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize("length", [1, 3])
def test_each_device_gathers_its_own_rows(data_dir, length):
    """The program has no communication, and its inputs are indices instead of images."""
    loader = Loader(open_digits(data_dir), mesh(8), resident=True, alternating_flip=True)
    first = next(loader.train_inputs(7, 200, range(length), lengths=[length]))
    shapes = loader.train_shapes(200, length)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), first) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), shapes
    )
    if length == 1:
        text = jax.jit(gathered).lower(first).compile().as_text()
        assert not re.search(r"all-|collective|reduce-scatter", text)
        assert re.search(r"u8\[25,32,32,1\]", text)  # an eighth of 200
