"""Images in folders, as SPLIT/CLASS/IMAGE."""

import hashlib
import unicodedata

import numpy as np
import PIL.Image
import pytest

from tests.conftest import raises_user_error, write_tfds
from tests.data.archives import encoded
from vgg_jax.config import Config, DataConfig
from vgg_jax.data.dataset import open_split
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.data.transforms import Views
from vgg_jax.training.inputs import open_splits


def test_images_in_folders(tmp_path):
    random = np.random.default_rng(0)
    for split, classes in (("train", ("cat", "dog", "emu")), ("test", ("cat", "emu"))):
        for name in classes:
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(3):
                image = PIL.Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8))
                (directory / f"{i}.png").write_bytes(encoded(image, "PNG"))
            (directory / "notes.txt").write_text("no image")

    def open_folder(split):
        return open_split(str(tmp_path), split, Views(image_size=16, resize=16), data_dir="")

    split = open_folder("test")
    assert (len(split), split.num_classes, split.channels) == (6, 3, 3)
    assert [split.test_view(i)[1] for i in range(6)] == [0, 0, 0, 2, 2, 2]
    expected = np.asarray(PIL.Image.open(tmp_path / "test" / "emu" / "1.png"))
    np.testing.assert_array_equal(split.pixels(4)[0], expected)
    assert open_split(str(tmp_path), "test", data_dir="", class_split="test").num_classes == 2
    with raises_user_error("has no folder 'validation'; found test, train"):
        open_folder("validation")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with raises_user_error("none has no images"):
        open_folder("none")
    (tmp_path / "test" / "cat" / "0.png").unlink()
    with raises_user_error(f"{tmp_path}/test/cat/0.png cannot be read: No such file"):
        split.test_view(0)
    (tmp_path / "test" / "bee").mkdir()
    with raises_user_error("has classes that train lacks: bee"):
        open_folder("test")


def write_images(root, *names, size=(8, 6)):
    """Write an image of its own color for each path; `*` in a path stands for ten images."""
    for name in names:
        for path in [name.replace("*", str(i)) for i in range(10)] if "*" in name else [name]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            color = tuple(hashlib.sha256(path.encode()).digest()[:3])
            (root / path).write_bytes(encoded(PIL.Image.new("RGB", size, color), "PNG"))


def open_part(root, split, class_split="train", **options):
    return open_split(str(root), split, data_dir="", class_split=class_split, **options)


def paths(split):
    return [split.records.locate(i) for i in range(len(split))]


def labels(split):
    return [int(split.test_view(i)[1]) for i in range(len(split))]


def test_suffixes_subfolders_and_links_of_a_class(tmp_path, capsys):
    write_images(tmp_path, "train/cat/a.tif", "train/cat/2019/b.BMP", "train/dog/c.ppm", "train/dog/d.gif")
    write_images(tmp_path, "train/._x.png", "train/cat/._0003.jpg", "train/__MACOSX/cat/0.png", "train/loose.png")
    write_images(tmp_path, "train/.ipynb_checkpoints/0.png", "elsewhere/e.jfif")
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/dog/0.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/dog/up").symlink_to(tmp_path / "train")
    split = open_part(tmp_path, "train")
    assert split.class_names == ("cat", "dog")
    names = ["cat/2019/b.BMP", "cat/a.tif", "dog/c.ppm", "dog/d.gif", "dog/more/e.jfif"]
    assert paths(split) == [f"{tmp_path}/train/{name}" for name in names]
    assert labels(split) == [0, 0, 1, 1, 1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"note: {tmp_path}/train: skipped 8 files: 1 .txt (dog/notes.txt), 1 dangling link (dog/0.png)"
    )
    assert "4 hidden or system files" in line
    assert "1 file outside the class folders (loose.png)" in line
    assert "1 link to a folder above (dog/up)" in line


def test_class_without_images_is_an_error(tmp_path):
    write_images(tmp_path, "train/cat/*.png")
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/0.heic").write_text("")
    with raises_user_error("train has no image of dog; expected images in each class folder", "1 .heic (dog/0.heic)"):
        open_part(tmp_path, "train")


def test_selection_of_classes_reads_no_file(tmp_path):
    write_images(tmp_path, "train/cat/0.png", "train/dog/0.png", "train/dog/1.png")
    split = open_part(tmp_path, "train")
    for path in tmp_path.glob("train/*/*"):
        path.unlink()
    assert len(split.select((1,))) == 2
    relabeled = split.relabel((3, 0), ("dog", "emu", "fox", "cat"))
    assert (len(relabeled.select((0,))), len(relabeled.select((3,)))) == (2, 1)


def test_names_are_compared_in_one_unicode_form(tmp_path, capsys):
    """MacOS writes file names in the form NFD, other systems in NFC."""
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_images(
        tmp_path, f"train/{nfc}/0.png", "train/tea/1.png", f"test/{nfd}/2.png", f"val/{nfd}/3.png", f"val/{nfc}/4.png"
    )
    assert labels(open_part(tmp_path, "test")) == [0]
    assert open_part(tmp_path, "test").class_names == (nfc, "tea")
    assert capsys.readouterr().err == ""
    assert labels(open_part(tmp_path, "val")) == [0, 0]
    assert "2 folders are the class café (Unicode NFC and NFD)" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_slices_are_disjoint_complete_and_mix_the_classes(tmp_path, prefix, capsys):
    """A folder without split folders is the split train; this is said once for its two parts."""
    write_images(tmp_path, *(f"{prefix}{name}/*.png" for name in ("cat", "dog", "emu", "fox")))
    whole = open_part(tmp_path, "train")
    first, rest = (open_part(tmp_path, part, "train[:80%]") for part in ("train[:80%]", "train[80%:]"))
    assert (len(first), len(rest)) == (32, 8)
    assert sorted(paths(first) + paths(rest)) == paths(whole)
    assert paths(first) == sorted(paths(first))
    assert first.class_names == rest.class_names == whole.class_names == ("cat", "dog", "emu", "fox")
    assert len(set(labels(first))) == 4
    assert len(set(labels(rest))) > 2
    assert paths(open_part(tmp_path, "train[30:32]+train[80%:]"))[2:] == paths(rest)
    assert set(paths(open_part(tmp_path, "train[-8:]"))) == set(paths(rest))
    assert len(open_part(tmp_path, "train[12.5%:15]")) == 10
    line = f"note: {tmp_path} has no split folders; its 4 folders are classes: cat, dog, emu, fox\n"
    assert capsys.readouterr().err == ("" if prefix else line)


def test_slice_hardly_changes_with_another_image(tmp_path):
    """An image never moves from the training part to the test part but at the boundary."""
    write_images(tmp_path / "a", "cat/*.png", "dog/*.png")
    before = {path.removeprefix(f"{tmp_path}/a/") for path in paths(open_part(tmp_path / "a", "train[:80%]"))}
    write_images(tmp_path / "b", "cat/*.png", "dog/*.png", "cat/new.png")
    after = {path.removeprefix(f"{tmp_path}/b/") for path in paths(open_part(tmp_path / "b", "train[:80%]"))}
    assert len(before ^ after) <= 2


def test_sum_of_splits_has_the_classes_of_both(tmp_path):
    write_images(tmp_path, "train/cat/0.png", "val/dog/1.png")
    split = open_part(tmp_path, "train+val", "train+val")
    assert split.class_names == ("cat", "dog")
    assert labels(split) == [0, 1]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train[100:]", "the boundary 100 of a split exceeds its 20 images"),
        ("train[90%:10%]", "'train[90%:10%]' of {root} is empty; choose a larger part"),
        ("train[x]", "split 'train[x]' is not a name or a part; expected such as train, train[:80%] or train[100:]"),
        ("test", "{root} has no split 'test': its folders cat, dog hold images"),
        ("test", "config.data.train_split='train[:80%]' and config.data.eval_split='train[80%:]'"),
    ],
)
def test_unusable_parts_of_a_folder_are_named(tmp_path, part, message):
    write_images(tmp_path, "cat/*.png", "dog/*.png")
    with raises_user_error(message.format(root=tmp_path)):
        open_part(tmp_path, part)


@pytest.mark.parametrize(
    ("folders", "split", "message"),
    [
        (
            ("train", "val"),
            "test",
            "found train, val; did you mean val? Set config.data.eval_split=val, or --split val",
        ),
        (("training", "test"), "train", "did you mean training? Set config.data.train_split=training"),
        (("train",), "test", "found train; set config.data.eval_split, or --split, to one of them, or use parts: set"),
        (("train",), "test", "set config.data.train_split='train[:80%]' and config.data.eval_split='train[80%:]'"),
        (("fold1", "fold2"), "train", "found fold1, fold2; set config.data.train_split, or --split, to one of them"),
    ],
)
def test_missing_split_names_the_field_and_the_found(tmp_path, folders, split, message):
    write_images(tmp_path, *(f"{folder}/cat/0.png" for folder in folders))
    with raises_user_error(f"has no folder {split!r}; {message}" if "found" in message else message):
        open_part(tmp_path, split, split)


def test_split_folders_without_classes_are_no_classes(tmp_path):
    write_images(tmp_path, "train/*.png", "test/*.png")
    with raises_user_error(f"{tmp_path}/train has no class folders; expected train/CLASS/IMAGE"):
        open_part(tmp_path, "train")


def test_wrong_places_of_a_data_set_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, "animals/train/cat/0.png")
    with raises_user_error("TFDS has no data set 'animals'", "did you mean ./animals?"):
        open_split("animals", "train", data_dir=str(tmp_path / "tfds"))
    with raises_user_error("./animal does not exist; expected a directory with SPLIT/CLASS/IMAGE"):
        open_split("./animal", "train", data_dir="")
    with raises_user_error("0.png is a file; expected a directory"):
        open_split("./animals/train/cat/0.png", "train", data_dir="")


def test_tfds_directory_without_version_names_the_versions(data_dir):
    for parent in ("digits", "."):
        with raises_user_error("holds data sets of TFDS; choose the directory of one", "digits/1.0.0"):
            open_split(f"{data_dir}/{parent}", "train", data_dir="")
    assert len(open_split(f"{data_dir}/digits/1.0.0", "test", data_dir="")) == 360
    with raises_user_error("did you mean test? Set config.data.eval_split=test"):
        open_split(f"{data_dir}/digits/1.0.0", "validation", data_dir="")


def test_folder_under_one_channel_is_gray(tmp_path):
    """As the prediction of a one-channel network: colors become gray."""
    write_images(tmp_path, "train/cat/*.png", "test/cat/*.png")
    config = Config(data=DataConfig(str(tmp_path), mean=(0.5,), std=(0.25,)))
    for split in open_splits(config):
        assert split.channels == 1
        view, _ = split.test_view(0)
        assert view.shape == (32, 32, 1)
        gray = Preprocessing(32, 32, (0.5,), (0.25,), "L")
        np.testing.assert_array_equal(view, gray.view(PIL.Image.open(split.records.locate(0))))
    color = open_part(tmp_path, "test").decoded_for(gray)
    np.testing.assert_array_equal(color.pixels(0)[0], split.pixels(0)[0])


def test_class_names_of_tfds_are_kept_if_they_are_real(tmp_path, data_dir):
    import tensorflow_datasets as tfds

    names = ["cat", "dog"]
    features = {
        "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=names),
    }
    example = {"image": PIL.Image.new("RGB", (4, 4)), "label": 1}
    write_tfds(str(tmp_path), "animals", "1.0.0", features, {"train": [example]})
    assert open_split(f"{tmp_path}/animals/1.0.0", "train", data_dir="").class_names == ("cat", "dog")
    assert open_split("digits", "train", data_dir=data_dir).class_names == ()  # only the numbers


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_configuration_divides_one_folder(prefix, tmp_path):
    write_images(tmp_path, f"{prefix}cat/*.png", f"{prefix}dog/*.png")
    data = DataConfig(str(tmp_path), train_split="train[:80%]", eval_split="train[80%:]")
    train, test = open_splits(Config(data=data))
    assert (len(train), len(test), train.num_classes, test.num_classes) == (16, 4, 2, 2)
    assert not set(paths(train)) & set(paths(test))
