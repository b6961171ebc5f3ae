"""Class names stay with a network: from the data to training, prediction, evaluation, resumption and other formats."""

import dataclasses
import json
import shutil
import unicodedata

import jax
import numpy as np
import PIL.Image
import pytest
from jax.sharding import Mesh

from tests.conftest import raises_user_error, random_variables, write_tfds
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG, Network, load
from vgg_jax.cli import convert, evaluate, predict
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation.matching import network_labels
from vgg_jax.evaluation.results import Result
from vgg_jax.training import loop
from vgg_jax.training.checkpoints import saved_steps
from vgg_jax.training.checksums import read_metadata
from vgg_jax.training.class_names import check_same_classes, output_names
from vgg_jax.training.initialization import source_variables
from vgg_jax.training.run_directory import keep_num_classes, read_config
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.validation import create_model
from vgg_jax.weights.imagenet_classes import imagenet_classes, imagenet_synsets

NAMES = ("10", "2", "café", "with space")  # in the order of the folders
COLORS = {"10": (220, 40, 40), "2": (40, 220, 40), "café": (40, 40, 220), "with space": (230, 230, 230)}


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """Train narrow networks on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        patch.setattr(loop, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), (AXIS,)))
        yield


def pictures(name, count, seed=0):
    random = np.random.default_rng([seed, *name.encode()])
    noise = random.integers(-30, 30, (count, 16, 16, 3))
    return [PIL.Image.fromarray((np.array(COLORS[name]) + n).clip(0, 255).astype(np.uint8)) for n in noise]


def write_folder(root, names, splits):
    for seed, (split, count) in enumerate(splits.items()):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i, picture in enumerate(pictures(name, count, seed)):
                picture.save(root / split / name / f"{i}.png")
    return root


def config_for(dataset, data_dir="", **fields):
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4)),
        data=DataConfig(
            **dict(dataset=str(dataset), data_dir=str(data_dir), image_size=16, resize=16, pad=0),
            **dict(mean=(0.5,) * 3, std=(0.25,) * 3),
        ),
        optimizer=OptimizerConfig(name="adam", learning_rate=0.003, weight_decay=0.0),
        **{"batch_size": 16, "num_epochs": 12.0, "eval_batch_size": 16, "checkpoint_every_epochs": 12.0, **fields},
    )


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "animals", NAMES, {"train": 8, "test": 4})


@pytest.fixture(scope="module")
def run(animals, tmp_path_factory):
    """Return the directory of a run whose network tells the four classes apart."""
    workdir = tmp_path_factory.mktemp("runs") / "animals"
    assert loop.train_and_evaluate(config_for(animals), str(workdir)) == 0
    return workdir


def command(module, *arguments):
    return module.main([*map(str, arguments)])


def error_of(folder):
    return Result.load(str(folder / "center_crop.npz"))


def test_run_and_its_checkpoints_keep_names_and_number(run):
    config = read_config(str(run))
    assert (config.data.class_names, config.model.num_classes) == (NAMES, 4)
    (step, *_) = saved_steps(run / "checkpoints")
    progress = read_metadata(str(run / "checkpoints" / str(step)))["progress"]
    assert progress["class_names"] == list(NAMES)
    expected = {"resize": 16, "crop": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "channel_order": "RGB", "exif": True}
    assert progress["preprocessing"] == expected
    assert load(run).classes == NAMES


def test_names_and_figures_survive_conversion(run, animals, tmp_path, capsys):
    assert command(convert, run, tmp_path / "a.safetensors") == 0
    assert command(convert, tmp_path / "a.safetensors", tmp_path / "b.pth") == 0
    printed = {}
    for weights in (run, tmp_path / "a.safetensors", tmp_path / "b.pth"):
        assert load(weights).preprocessing == Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3)
        capsys.readouterr()
        folders = [animals / "test" / name for name in NAMES]
        assert command(predict, "--weights", weights, "--json", "--top", 4, *folders) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        printed[weights] = captured.out
        lines = [json.loads(line) for line in captured.out.splitlines()]
        assert [line["predictions"][0]["name"] for line in lines] == [name for name in NAMES for _ in range(4)]
        assert {(p["class"], p["name"]) for line in lines for p in line["predictions"]} == set(enumerate(NAMES))
    assert len(set(printed.values())) == 1


def test_folder_of_two_classes_counts_right(run, tmp_path, capsys, monkeypatch):
    """In this folder, class 2 is the first of two, and an image of another class lies among its images."""
    folder = write_folder(tmp_path / "other", ("2", "with space"), {"test": 4})
    pictures("10", 1)[0].save(folder / "test" / "2" / "z.png")
    assert command(convert, run, tmp_path / "a.pth") == 0
    for name, source in (("run", ("--workdir", run)), ("file", ("--weights", tmp_path / "a.pth", "--split", "test"))):
        options = ("--dataset", folder, "--output", tmp_path / name, "--confusion", tmp_path / f"{name}.png")
        capsys.readouterr()
        assert command(evaluate, *source, *options) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        result = error_of(tmp_path / name)
        assert result.classes == NAMES
        assert result.labels.tolist() == [1] * 5 + [3] * 4
        assert (result.posteriors.argmax(1) == [1] * 4 + [0] + [3] * 4).all()
        table = [line.split("  ") for line in captured.out.splitlines() if line.startswith(("class ", "2 ", "with "))]
        cells = [[cell.strip() for cell in row if cell] for row in table]
        assert cells[0] == ["class", "images", "top-1 error, %", "most often taken for"]
        assert cells[1:] == [["2", "5", "20.0", "10"], ["with space", "4", "0.0"]]
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_class_that_the_network_lacks_is_refused(run, tmp_path, capsys):
    folder = write_folder(tmp_path / "other", ("2",), {"test": 1})
    for name in ("emu", "12"):
        shutil.copytree(folder / "test" / "2", folder / "test" / name)
    assert command(evaluate, "--workdir", run, "--dataset", folder, "--output", tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{folder}/test has classes that the network lacks: 12, emu; expected some of 10, 2, café, with" in error
    assert not (tmp_path / "out").exists()


def test_network_without_names_is_compared_by_number(run, animals, tmp_path, capsys):
    dataclasses.replace(load(run), classes=None).save(tmp_path / "a.safetensors")
    options = ("--weights", tmp_path / "a.safetensors", "--dataset", animals, "--split", "test")
    assert command(evaluate, *options, "--output", tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert (error_of(tmp_path).posteriors.argmax(1) == np.repeat(range(4), 4)).all()
    two = write_folder(tmp_path / "two", ("2", "with space"), {"train": 1, "test": 1})
    assert command(evaluate, *options[:2], "--dataset", two, "--split", "test", "--output", tmp_path / "out") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: the network states no class names, so labels are compared by number: 2 classes of" in line
    assert command(predict, "--weights", tmp_path / "a.safetensors", animals / "test" / "2" / "0.png", "--top", 1) == 0
    captured = capsys.readouterr()
    assert captured.out.split()[-1] == "1"
    assert captured.err.count("states no class names, so classes are numbers; add --classes FILE") == 1
    (tmp_path / "names.txt").write_text("ten\ntwo\ncoffee\nspace\n")
    options = ("--weights", tmp_path / "a.safetensors", "--classes", tmp_path / "names.txt", "--top", 1)
    assert command(predict, *options, animals / "test" / "2" / "0.png") == 0
    captured = capsys.readouterr()
    assert (captured.out.split()[-1], captured.err) == ("two", "")


def test_unknown_preprocessing_is_asked_for(run, animals, tmp_path, capsys):
    dataclasses.replace(load(run), preprocessing=None).save(tmp_path / "a.safetensors")
    weights, image = ("--weights", tmp_path / "a.safetensors"), animals / "test" / "2" / "0.png"
    for module, arguments in (
        (predict, (*weights, image)),
        (evaluate, (*weights, "--dataset", animals, "--split", "test", "--output", tmp_path / "out")),
    ):
        assert command(module, *arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "a.safetensors does not state the preprocessing of its images" in error
        assert "--preprocessing imagenet, authors or cifar10, or --mean, --std, --resize, --crop and" in error
        fields = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--resize", 16, "--crop", 16)
        assert command(module, *arguments, *fields) == 0
    assert (error_of(tmp_path / "out").posteriors.argmax(1) == np.repeat(range(4), 4)).all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("add", "emu added; renumbered: with space is 4, was 3"),
        ("remove", "2 missing; renumbered: café is 1, was 2, with space is 2, was 3"),
        ("rename", "tea added; café missing"),
        ("reorder", "1 added; café missing; renumbered: 10 is 1, was 0, 2 is 2, was 1"),
    ],
)
def test_resume_with_other_classes_lists_the_difference(change, line, run, animals, tmp_path, capsys):
    folder, workdir = shutil.copytree(animals, tmp_path / "animals"), shutil.copytree(run, tmp_path / "run")
    for split in ("train", "test"):
        if change == "add":
            shutil.copytree(folder / split / "2", folder / split / "emu")
        elif change == "remove":
            shutil.rmtree(folder / split / "2")
        else:
            (folder / split / "café").rename(folder / split / ("tea" if change == "rename" else "1"))
    before = (workdir / "config.json").read_bytes()
    config = config_for(folder, num_epochs=13.0)
    for allow_changes in (False, True):
        with raises_user_error(f"{workdir} was trained on other classes: {line}; restore the classes of the data"):
            loop.train_and_evaluate(config, str(workdir), allow_changes=allow_changes)
    assert (workdir / "config.json").read_bytes() == before
    (workdir / "config.json").unlink()  # the checkpoints state the names too
    with raises_user_error(f"{workdir} was trained on other classes: {line}"):
        loop.train_and_evaluate(config, str(workdir))


def test_run_of_an_older_version_loads_and_resumes(run, animals, tmp_path, capsys):
    """Such a run has no class names, and may have 10 outputs, which was the default."""
    workdir = shutil.copytree(run, tmp_path / "run")
    stored = json.loads((workdir / "config.json").read_text())
    del stored["data"]["class_names"]
    (workdir / "config.json").write_text(json.dumps(stored))
    net = load(workdir)
    assert (net.classes, net.model.num_classes) == (None, 4)
    assert loop.train_and_evaluate(config_for(animals), str(workdir)) == 0
    assert f"{workdir} is finished: step 24 of 24" in capsys.readouterr().out
    stored["model"]["num_classes"] = 10
    (workdir / "config.json").write_text(json.dumps(stored))
    assert keep_num_classes(config_for(animals), str(workdir)).model.num_classes == 10
    assert keep_num_classes(config_for(animals), str(run)).model.num_classes == 0  # the data of this run count


def test_last_layer_for_other_classes_is_noted(run, animals, capsys):
    """A new run that takes all layers from another run is told if the outputs meant other classes there."""
    config = config_for(animals, init_from=str(run), init_layers=("features", "head"))
    for names, lines in (
        (NAMES, 0),
        (("2", "10", "café", "with space"), 1),
    ):
        config.data.class_names = names
        model = create_model(dataclasses.replace(config.model, num_classes=4))
        source_variables(config, model)
        found = [
            line for line in capsys.readouterr().err.splitlines() if "is for other classes: renumbered: 10" in line
        ]
        assert len(found) == lines


def test_more_outputs_than_classes_are_logged(animals, capsys):
    config = config_for(animals)
    config.model.num_classes = 10
    resolved = loop.build(config, loop.make_mesh()).config
    assert (resolved.model.num_classes, resolved.data.class_names) == (10, NAMES)
    assert capsys.readouterr().out.splitlines() == ["10 outputs for 4 classes"]
    assert output_names(NAMES, 6) == (*NAMES, "unused output 4", "unused output 5")
    config.model.num_classes = 3
    with raises_user_error("config.model.num_classes is 3; expected at least 4, the classes of"):
        loop.build(config, loop.make_mesh())


def test_names_of_tfds_labels_are_kept_and_mapped(tmp_path, capsys):
    """The data set that is evaluated has two of the four classes, in another order."""
    import tensorflow_datasets as tfds

    def write(name, names):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=names),
        }
        splits = {
            split: [{"image": image, "label": n} for n in names for image in pictures(n, count, seed)]
            for seed, (split, count) in enumerate((("train", 8), ("test", 4)))
        }
        write_tfds(str(tmp_path), name, "1.0.0", features, splits)
        return tmp_path / name / "1.0.0"

    names = ["with space", "10", "2", "café"]
    four, two = write("four", names), write("two", ["2", "with space"])
    assert loop.train_and_evaluate(config_for(four), str(tmp_path / "run")) == 0
    assert load(tmp_path / "run").classes == tuple(names)
    assert command(evaluate, "--workdir", tmp_path / "run", "--dataset", two, "--output", tmp_path / "out") == 0
    result = error_of(tmp_path / "out")
    assert result.labels.tolist() == result.posteriors.argmax(1).tolist() == [2] * 4 + [0] * 4


def test_names_of_data_without_names_can_be_given(data_dir, tmp_path, capsys):
    """TFDS gives numbers for the names of a label without names; these are not kept."""
    config = config_for("digits", data_dir)
    config.data.mean = config.data.std = (0.5,)
    mesh = loop.make_mesh()
    run = loop.build(config, mesh)
    assert (run.config.data.class_names, run.config.model.num_classes) == ((), 10)
    config.data.class_names = names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert loop.build(config, mesh).config.data.class_names == names
    config.data.class_names = names[:9]
    with raises_user_error("config.data.class_names has 9 names; expected 10, the classes of digits/train"):
        loop.build(config, mesh)


def test_given_names_that_differ_from_the_data_are_refused(animals):
    config = config_for(animals)
    config.data.class_names = ("10", "2", "café", "tea")
    with raises_user_error("config.data.class_names differs from the classes of", "tea added; with space missing"):
        loop.build(config, loop.make_mesh())


def test_lost_names_are_refused_with_the_remedy():
    with raises_user_error("expected cat, dog; set --config.data.class_names to these names"):
        check_same_classes("run", ("cat", "dog"), ())
    check_same_classes("run", (), ("cat", "dog"))
    check_same_classes("run", ("cat", "dog"), ("cat", "dog"))


def test_imagenet_folders_are_matched_by_wordnet_identifiers():
    """Folders of ImageNet, and of parts of it such as Imagenette, are called n01440764."""
    classes, synsets = imagenet_classes(), imagenet_synsets()
    assert output_names(synsets, 1000) == classes
    pairs = list(zip(synsets, classes, strict=True))
    assert (pairs[0], pairs[207]) == (("n01440764", "tench"), ("n02099601", "golden retriever"))
    assert network_labels("data/val", ("n01440764", "n02099601", "goldfish"), classes) == (0, 207, 1)
    assert network_labels("data/val", synsets, classes) == tuple(range(1000))
    with raises_user_error("data/val has classes that the network lacks: n01440764; expected some of cat, dog"):
        network_labels("data/val", ("n01440764", "cat"), ("cat", "dog"))
    with raises_user_error("the network has several classes of one name: cat"):
        network_labels("data/val", ("cat",), ("cat", "dog", "cat"))
    assert output_names((), 1000) is None


def test_names_are_compared_in_unicode_nfc(run, animals, tmp_path, capsys):
    """A list of names from macOS is in the form NFD, the names of a run are in NFC."""
    nfd = [unicodedata.normalize("NFD", name) for name in NAMES]
    assert nfd != list(NAMES)
    assert network_labels("data", NAMES[2:], nfd) == network_labels("data", nfd[2:], NAMES) == (2, 3)
    check_same_classes("run", nfd, NAMES)
    config = config_for(animals)
    config.data.class_names = tuple(nfd)
    assert loop.build(config, loop.make_mesh()).config.data.class_names == NAMES
    (tmp_path / "names.txt").write_text("\n".join(nfd))
    arguments = ("--weights", run, "--classes", tmp_path / "names.txt", "--dataset", animals, "--split", "test")
    assert command(evaluate, *arguments, "--output", tmp_path) == 0
    assert error_of(tmp_path).classes == NAMES


def test_fusion_compares_the_classes(tmp_path):
    from vgg_jax.evaluation.results import fused

    paths = [str(tmp_path / f"{name}.npz") for name in "abc"]
    for path, classes in zip(paths, (("cat", "dog"), ("dog", "cat"), ()), strict=True):
        scores = np.full((1, 2), 0.5, np.float32)
        Result(scores, np.zeros(1, np.int64), "A", "dense", "256", (256,), "pets/test", classes).save(path)
    with raises_user_error("b.npz has 'dog' as class 0; expected 'cat', as in", "fuse networks with the same classes"):
        fused(paths)
    assert fused([paths[0], paths[2]])[0].classes == ("cat", "dog")


@pytest.mark.usefixtures("narrow")
def test_folder_without_training_split_numbers_itself(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", NAMES, {"test": 1})
    for classes in (4, 5):
        model = VGG(11, num_classes=classes, pool_size=1, hidden=())
        path = tmp_path / f"{classes}.safetensors"
        Network(model, random_variables(model, 32, 32, 3), Preprocessing(32, 32)).save(path)
        options = ("--weights", path, "--dataset", folder, "--split", "test", "--output", tmp_path)
        code = command(evaluate, *options)
        printed = capsys.readouterr().err
        if classes == 4:
            assert code == 0
            assert "no folder 'train'" in printed
            assert f"in the order of their names: {', '.join(sorted(NAMES))}; add --classes FILE" in printed
        else:
            assert code == 2
            assert "found 4 class folders; expected 5: add --classes FILE" in printed
