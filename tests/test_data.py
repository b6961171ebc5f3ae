"""From TFDS records on disk to batches on the devices."""

import dataclasses
import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.conftest import photographs, raises_user_error, write_cifar10, write_tfds
from vgg_jax.config import Config, DataConfig
from vgg_jax.data import digits, views
from vgg_jax.data.augmentation import augment, normalize, random_crop, random_flip
from vgg_jax.data.order import permutation, train_indices
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import check_config, open_split, open_splits


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
                import PIL.Image

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


def test_a_stopped_preparation_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            digits.prepare(str(tmp_path))
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(open_split(digits_config(str(tmp_path)), "test")) == 360
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


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


@pytest.mark.parametrize("devices", [1, 8])
def test_resident_and_streamed_batches_are_equal(data_dir, devices):
    config = digits_config(data_dir)
    split = open_split(config, "train")
    batches = []
    for resident in (True, False):
        loader = Loader(split, config, mesh(devices), resident=resident)
        batches.append(to_numpy(loader.train_batches(7, 200, range(5, 9))))  # across the end of an epoch of 7 steps
        assert batches[-1][0]["image"].shape == (200, 32, 32, 1)
        assert batches[-1][0]["image"].dtype == np.uint8
        assert batches[-1][0]["label"].dtype == np.int32
    assert_equal_batches(*batches)


def test_batches_of_a_resumed_run_are_those_of_the_whole(data_dir):
    config = digits_config(data_dir)
    loader = Loader(open_split(config, "train"), config, mesh())
    whole = to_numpy(loader.train_batches(0, 300, range(8)))
    for start in range(8):
        assert_equal_batches(to_numpy(loader.train_batches(0, 300, range(start, 8))), whole[start:])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluation_sees_every_example_exactly_once(data_dir, batch_size, resident):
    config = digits_config(data_dir)
    split = open_split(config, "test")
    batches = to_numpy(Loader(split, config, mesh(8), resident=resident).eval_batches(batch_size))
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


def test_imagenet_is_streamed_as_random_resized_crops(tmp_path):
    """JPEGs of any size, `imagenet2012` 5.1.0: 224x224 crops, the same whenever and wherever they are read."""
    import tensorflow_datasets as tfds

    def encoded(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        return file.getvalue()

    photos = [encoded(image) for image in photographs(12)]
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    examples = [{"image": photo, "label": 80 * i, "file_name": f"{i}.JPEG"} for i, photo in enumerate(photos)]
    write_tfds(str(tmp_path), "imagenet2012", "5.1.0", features, {"train": examples, "validation": examples[:5]})

    config = DataConfig("imagenet2012", str(tmp_path), image_size=224, resize=256, train_view="random_resized_crop")
    split = open_split(config, "train")
    assert (split.num_classes, split.channels) == (1000, 3)
    loader = Loader(split, config, mesh())
    whole = to_numpy(loader.train_batches(0, 4, range(6)))
    assert whole[0]["image"].shape == (4, 224, 224, 3)
    assert_equal_batches(to_numpy(Loader(split, config, mesh(4)).train_batches(0, 4, range(4, 6))), whole[4:])
    first_epoch, second_epoch = (np.concatenate([b["label"] for b in whole[i : i + 3]]) for i in (0, 3))
    assert sorted(first_epoch) == sorted(second_epoch) == [80 * i for i in range(12)]
    # The same photograph is cropped anew in the second epoch.
    position = int(np.flatnonzero(second_epoch == first_epoch[0])[0])
    assert (whole[0]["image"][0] != whole[3 + position // 4]["image"][position % 4]).mean() > 0.5

    evaluation = to_numpy(Loader(open_split(config, "validation"), config, mesh()).eval_batches(3))
    assert [batch["weight"].tolist() for batch in evaluation] == [[1, 1, 1], [1, 1, 0]]


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path):
    with raises_user_error(
        "cifar10/3.0.2 is not in", str(tmp_path), "--config.data.data_dir", "download_and_prepare()"
    ):
        open_split(DataConfig(data_dir=str(tmp_path)), "train")
    with raises_user_error("'cifar11'", str(tmp_path)):
        open_split(DataConfig(dataset="cifar11", data_dir=str(tmp_path)), "train")


def test_tfrecord_data_are_refused_with_the_way_to_convert_them(tmp_path):
    write_cifar10(str(tmp_path), num_train=10, num_test=10)
    path = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with raises_user_error("is in tfrecord format; expected array_record", "tfds convert_format"):
        open_split(DataConfig(data_dir=str(tmp_path)), "train")


def test_missing_split_lists_those_there_are(data_dir):
    with raises_user_error("'validation'", "train (1437), test (360)"):
        open_split(digits_config(data_dir), "validation")


def test_labels_out_of_range_are_found(data_dir):
    config = digits_config(data_dir)
    split = open_split(config, "test")
    object.__setattr__(split, "num_classes", 9)
    with raises_user_error("digits/test, example", "label 9; expected 0 up to 8"):
        Loader(split, config, mesh())


def test_configuration_against_data_and_devices(data_dir):
    config = Config(data=digits_config(data_dir), batch_size=100)
    train, test = open_split(config.data, "train"), open_split(config.data, "test")
    check_config(config, train, test, 4)
    with raises_user_error("batch_size is 100", "the nearest are 96 and 104"):
        check_config(config, train, test, 8)
    config.batch_size = 2000
    with raises_user_error("expected at most 1437"):
        check_config(config, train, test, 1)
    config.batch_size, config.model.num_classes = 4, 5
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    with raises_user_error("expected at least 10, the classes of digits/train", "expected 1, as the images"):
        check_config(config, train, test, 1)


# --- views


def test_test_views_are_torchvisions_to_the_pixel(torchvision):
    transforms = torchvision.transforms
    for resize, size in ((256, 224), (232, 224), (97, 65)):
        reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        for image in photographs(20):
            ours = views.centre_crop(views.resize_short_side(image, resize), size)
            np.testing.assert_array_equal(ours, np.asarray(reference(image)))


def test_random_resized_crop_follows_torchvisions_distribution():
    """On a gradient image the crop's place and size can be read off its corners."""
    height, width = 300, 400
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    import PIL.Image

    image = PIL.Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    areas, aspects = [], []
    for position in range(400):
        crop = views.random_resized_crop(image, 32, 0, position).astype(float)
        tall = (crop[-1, :, 0].mean() - crop[0, :, 0].mean()) / 255 * height * 32 / 31
        wide = (crop[:, -1, 1].mean() - crop[:, 0, 1].mean()) / 255 * width * 32 / 31
        areas.append(tall * wide / (height * width))
        aspects.append(wide / tall)
    # Uniform in [0.08, 1] but for the rejected: within 5 standard errors of the mean that a simulation gives, 0.48.
    assert 0.06 < min(areas) < 0.12
    assert 0.9 < max(areas) < 1.05
    assert abs(np.mean(areas) - 0.48) < 5 * 0.25 / np.sqrt(400)
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.42
    np.testing.assert_array_equal(
        views.random_resized_crop(image, 32, 0, 7), views.random_resized_crop(image, 32, 0, 7)
    )


# --- augmentation on the device


def test_random_crop_shifts_by_every_offset_and_fills_with_zeros():
    image = np.arange(1, 37, dtype=np.uint8).reshape(6, 6, 1)
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(np.stack([image] * 2000)), 2))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    expected = {padded[i : i + 6, j : j + 6].tobytes(): (i, j) for i in range(5) for j in range(5)}
    counts = np.zeros((5, 5))
    for crop in crops:
        counts[expected[crop.tobytes()]] += 1
    # 25 equally likely offsets: 80 each; chi-square with 24 degrees of freedom exceeds 60 once in 16,000.
    assert ((counts - 80) ** 2 / 80).sum() < 60


def test_random_flip_mirrors_half():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    images = np.asarray(random_flip(jax.random.key(1), jnp.asarray(np.stack([image] * 2000))))
    flipped = (images == image[:, ::-1]).all((1, 2, 3))
    assert ((images == image).all((1, 2, 3)) ^ flipped).all()
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)  # five standard errors


def test_normalisation_is_torchvisions(torchvision):
    import torch

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    expected = torchvision.transforms.Normalize(mean, std)(tensor).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(normalize(jnp.asarray(images), mean, std), expected, atol=1e-6)  # float32 rounding


def test_augment_is_a_pure_function_of_its_key():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8))

    def view(seed, **fields):
        return augment(jax.random.key(seed), images, normalize=lambda x: x.astype(jnp.float32), **fields)

    np.testing.assert_array_equal(view(0, pad=2, flip=True), view(0, pad=2, flip=True))
    assert (view(0, pad=2, flip=True) != view(1, pad=2, flip=True)).any()
    np.testing.assert_array_equal(view(0, pad=0, flip=False), images.astype(jnp.float32))
