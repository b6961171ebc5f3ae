"""`python -m vgg_jax evaluate`."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, random_variables, write_tfds
from tests.data.archives import encoded
from vgg_jax import VGG
from vgg_jax.cli import evaluate
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation import results
from vgg_jax.evaluation.protocols import PROTOCOLS
from vgg_jax.network import load
from vgg_jax.weights.formats import Loaded, save_file

# VGG-11 with all its pools and a head for one position: crops of 32 pixels.
TINY, TINY_PREPARE = dict(depth=11, pool_size=1, hidden=(16,)), Preprocessing(resize=36, crop=32)


def write_imagenet(path, count):
    """Write a data directory with `count` validation images, and the weights of two networks for them."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    photos = [photo.resize((50, 40 if i % 2 else 45)) for i, photo in enumerate(photographs(count))]
    examples = [
        {"image": encoded(photo, quality=90), "label": i % 7, "file_name": f"{i}.JPEG"}
        for i, photo in enumerate(photos)
    ]
    write_tfds(str(path), "imagenet2012", "5.1.0", features, {"validation": examples})
    for name, factor in (("a", 1.0), ("b", 1.1)):
        model = VGG(**TINY)
        variables = jax.tree.map(lambda leaf, factor=factor: leaf * factor, random_variables(model, 32, 32, 3))
        variables["params"]["fc8"]["kernel"] *= 100  # so that posteriors differ
        save_file(path / f"{name}.safetensors", Loaded(model, variables, TINY_PREPARE))
    return path


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), 21)


def run(arguments, capsys):
    code = evaluate.main([*map(str, arguments)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_all_protocols_and_their_fusion(count, tmp_path, capsys):
    imagenet = write_imagenet(tmp_path, count)
    arguments = ("--data-dir", imagenet, "--scales", 32, 36, 40, "--batch-size", 4)
    for name, protocol in (("a", "dense"), ("b", "all")):
        output = ("--output", tmp_path / name, "--confusion", tmp_path / f"{name}.png")
        weights = ("--weights", imagenet / f"{name}.safetensors")
        code, printed = run((*weights, *arguments, *output, "--protocol", protocol), capsys)
        assert code == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = [line.split("  ") for line in printed.out.splitlines()[-6:]]
    assert [cell.strip() for cell in rows[0] if cell] == [
        *("network", "train S", "test Q", "protocol", "top-1 error, %", "top-5 error, %", "paper, %")
    ]
    saved = {protocol: results.Result.load(str(tmp_path / "b" / f"{protocol}.npz")) for protocol in PROTOCOLS}
    for result in saved.values():
        np.testing.assert_allclose(result.posteriors.sum(1), 1, rtol=1e-5)
        assert result.labels.tolist() == [i % 7 for i in range(count)]
        top1 = 100 * results.top_k_error(result.posteriors, result.labels, 1)
        assert any(result.protocol in line and f"{top1:.1f}" in line for line in printed.out.splitlines())
    both = (saved["multi_scale"].posteriors + saved["multi_crop"].posteriors) / 2
    np.testing.assert_allclose(saved["dense+multi_crop"].posteriors, both, rtol=1e-5)
    assert saved["multi_scale"].test_scales == (32, 36, 40)
    assert saved["dense"].test_scales == (32,)
    assert np.abs(saved["dense"].posteriors - saved["center_crop"].posteriors).max() > 1e-4

    files = [tmp_path / name / "dense.npz" for name in ("a", "b")]
    code, printed = run(("--fuse", *files), capsys)
    assert code == 0
    a, b = (results.Result.load(str(file)) for file in files)
    mean = (a.posteriors.astype(np.float64) + b.posteriors) / 2
    np.testing.assert_array_equal(results.fused([str(file) for file in files])[0].posteriors, mean)
    assert f"{100 * results.top_k_error(mean, a.labels, 5):.1f}" in printed.out


def test_each_image_has_its_own_posteriors(imagenet, tmp_path, capsys):
    """An image in a batch, among images of two sizes, has the posteriors that it has alone."""
    weights = ("--weights", imagenet / "a.safetensors", "--data-dir", imagenet, "--protocol", "dense", "--scales", 36)
    for split, batch_size in (("validation[:9]", 2), ("validation[7:8]", 1)):
        output = ("--output", tmp_path / split, "--split", split, "--batch-size", batch_size)
        assert run((*weights, *output), capsys)[0] == 0
    whole, alone = (
        results.Result.load(str(tmp_path / split / "dense.npz")) for split in ("validation[:9]", "validation[7:8]")
    )
    np.testing.assert_allclose(whole.posteriors[7], alone.posteriors[0], rtol=1e-5)
    assert len(np.unique(whole.posteriors.round(6), axis=0)) == 9


def test_mistakes_give_one_line(imagenet, tmp_path, capsys):
    weights = ("--weights", imagenet / "a.safetensors", "--data-dir", imagenet)
    (tmp_path / "bad.npz").write_bytes(b"x")
    other = results.Result(np.ones((3, 5)), np.zeros(3, int), "A", "dense", "256", (256,), "digits/test")
    other.save(str(tmp_path / "other.npz"))
    results.Result(np.ones((2, 5)), np.zeros(2, int), "A", "dense", "256", (256,), "digits/test").save(
        str(tmp_path / "another.npz")
    )
    for arguments, line in (
        ((*weights, "--protocol", "dense", "--scales", 30), "the test scales are (30,); expected 32 or more"),
        ((*weights, "--batch-size", 0), "--batch-size is 0; expected 1 or more"),
        ((*weights, "--split", "test"), "split 'test' of imagenet2012/5.1.0 is missing or empty"),
        (("--fuse", tmp_path / "bad.npz"), "bad.npz is not a file of posteriors from vgg-jax evaluate"),
        (("--fuse", tmp_path / "nowhere.npz"), "nowhere.npz is not a file of posteriors"),
        (("--fuse", tmp_path / "other.npz", tmp_path / "another.npz"), "expected the images of"),
        (
            ("--fuse", tmp_path / "other.npz", "--classes", "a.txt", "--scales", 9),
            "found --scales, --classes; expected",
        ),
        ((*weights, "--output", tmp_path / "bad.npz"), "cannot write"),
    ):
        if "cannot write" in line:
            arguments += ("--split", "validation[:1]")
        code, printed = run(arguments, capsys)
        (error,) = printed.err.splitlines()
        assert code == 2
        assert line in error


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("order", "exif"), [("RGB", True), ("RGB", False), ("L", True)])
def test_turned_photographs_are_evaluated_as_predicted(order, exif, tmp_path, capsys):
    """The posteriors equal the probabilities of `predict`: one rule for EXIF, gray and 16 bits."""
    channels = len(order)
    model = VGG(**TINY, num_classes=3)
    variables = random_variables(model, 32, 32, channels)
    variables["params"]["fc8"]["kernel"] *= 300  # so that a turn shows
    prepare = Preprocessing(36, 32, (0.5,) * channels, (0.25,) * channels, order, exif)
    save_file(tmp_path / "net.safetensors", Loaded(model, variables, prepare))
    for i, photo in enumerate(photographs(3)):
        tag = PIL.Image.Exif()
        tag[0x0112] = (6, 3, 8)[i]
        for split in ("train", "val"):
            (tmp_path / split / f"class {i}").mkdir(parents=True)
            photo.resize((60, 44)).save(tmp_path / split / f"class {i}" / "0.jpg", exif=tag)
    arguments = ("--weights", tmp_path / "net.safetensors", "--dataset", tmp_path, "--split", "val")
    code, _ = run((*arguments, "--output", tmp_path / "out"), capsys)
    assert code == 0
    net = load(tmp_path / "net.safetensors")
    predictions = net.predict(tmp_path / "val", top=3)
    other = dataclasses.replace(net, preprocessing=dataclasses.replace(prepare, exif=not exif))
    others = other.predict(tmp_path / "val", top=3)
    assert run((*arguments, "--no-exif", "--output", tmp_path / "stored"), capsys)[0] == 0
    for folder, expected in (("out", predictions), ("stored", others if exif else predictions)):
        with np.load(tmp_path / folder / "center_crop.npz") as file:
            for row, prediction in zip(file["posteriors"], expected, strict=True):
                np.testing.assert_allclose(row[list(prediction.labels)], prediction.probabilities, atol=1e-5)
    differences = [
        np.abs(np.subtract(a.probabilities, b.probabilities)).max() for a, b in zip(predictions, others, strict=True)
    ]
    assert max(differences) > 1e-3
