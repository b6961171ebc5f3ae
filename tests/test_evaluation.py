"""The paper's evaluation, beside a fully convolutional network in PyTorch, and as a command."""

import itertools
import sys

import jax
import numpy as np
import pytest

from tests.archives import encoded
from tests.conftest import photographs, raises_user_error, random_variables, relative_error, write_tfds
from vgg_jax import VGG, evaluate, evaluation, paper, save, to_torch
from vgg_jax.config import DataConfig
from vgg_jax.preprocess import Preprocessing

# Networks with fewer pools: small images show the same as large ones.
SMALL = dict(depth=11, pool_after=(1, 2, 3), pool_size=7)
SMALL_PREPARE = Preprocessing(resize=64, crop=56)
SMALL_NETWORK = (VGG(**SMALL, hidden=(64, 32), num_classes=100), SMALL_PREPARE, (56, 64, 75))


def convolutional(torchvision, net):
    """torchvision's network with its linear layers as convolutions, and the mean over positions."""
    import torch

    layers = [net.features]
    size = 7
    for layer in net.classifier:
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.reshape(layer.out_features, -1, size, size)
            convolution = torch.nn.Conv2d(weight.shape[1], weight.shape[0], size)
            convolution.weight, convolution.bias = torch.nn.Parameter(weight), layer.bias
            layers.append(convolution)
            size = 1
        elif isinstance(layer, torch.nn.ReLU):
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers).eval()


def small_torch_network(torchvision):
    """Column A with three pools, a 7x7 head of 64 and 32, and 100 classes."""
    import torch

    cfg = [64, "M", 128, "M", 256, 256, "M", 512, 512, 512, 512]
    net = torchvision.models.VGG(torchvision.models.vgg.make_layers(cfg), num_classes=100)
    widths = (512 * 49, 64, 32, 100)
    linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    net.classifier = torch.nn.Sequential(
        *(linear[0], torch.nn.ReLU(), torch.nn.Dropout(), linear[1], torch.nn.ReLU(), torch.nn.Dropout(), linear[2])
    )
    return net.eval()


@pytest.mark.parametrize(
    ("build", "model", "prepare", "scales", "count"),
    [
        (small_torch_network, *SMALL_NETWORK, 3),
        pytest.param(small_torch_network, *SMALL_NETWORK, 10, marks=pytest.mark.grid),
        pytest.param(
            lambda torchvision: torchvision.models.vgg16(weights=None).eval(),
            *(VGG(16), Preprocessing(), (256, 288, 320), 10),
            marks=pytest.mark.grid,
        ),
    ],
    ids=["three_pools", "three_pools_ten_images", "vgg16"],
)
def test_dense_evaluation_is_that_of_a_convolutional_network(torchvision, build, model, prepare, scales, count):
    """Photographs of odd sizes at three scales, each with its mirror image."""
    import torch

    net = build(torchvision)
    variables = random_variables(model, prepare.crop, prepare.crop, 3)
    variables["params"]["fc8"]["kernel"] *= 100  # so that the posteriors differ
    net.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(model, variables).items()})
    reference = convolutional(torchvision, net)
    scores, posteriors = (
        jax.jit(function, static_argnums=0) for function in (evaluation.dense_scores, evaluation.dense_posteriors)
    )
    for photo in photographs(count):
        for scale in scales:
            image = prepare.uncropped(photo, scale)[None]
            assert min(image.shape[1:3]) == scale
            with torch.no_grad():
                both = [
                    reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).mean((2, 3))
                    for x in (image, image[:, :, ::-1])
                ]
            assert relative_error(scores(model, variables, image), both[0].numpy()) < 1e-5
            expected = sum(torch.softmax(x, 1) for x in both) / 2
            # Scores of up to some 20 with a relative error of 1e-6 are posteriors with one of 2e-5.
            np.testing.assert_allclose(posteriors(model, variables, image), expected.numpy(), rtol=1e-4, atol=1e-7)


def test_dense_scores_of_an_image_of_the_networks_size_are_its_logits():
    model = VGG(**SMALL, hidden=(16,), num_classes=10)
    variables = random_variables(model, 56, 56, 3)
    images = np.random.default_rng(0).normal(size=(2, 56, 56, 3)).astype(np.float32)
    scores = jax.jit(evaluation.dense_scores, static_argnums=0)(model, variables, images)
    np.testing.assert_allclose(scores, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected H and W of at least 56"):
        evaluation.dense_scores(model, variables, images[:, :48])


def test_the_crops_lie_on_a_grid_from_edge_to_edge():
    """Worked out by hand: 256x340 leaves 32 rows and 116 columns beside a crop of 224."""
    tops, lefts = (0, 8, 16, 24, 32), (0, 29, 58, 87, 116)
    assert evaluation.crop_corners(256, 340, 224) == [(top, left) for top in tops for left in lefts]
    assert evaluation.crop_corners(224, 227, 224) == [(0, left) for _ in range(5) for left in (0, 1, 2, 2, 3)]
    image = np.arange(20 * 30 * 3).reshape(20, 30, 3)
    crops = evaluation.grid_crops(image, 12)
    assert crops.shape == (25, 12, 12, 3)
    for crop, (top, left) in zip(crops, evaluation.crop_corners(20, 30, 12), strict=True):
        np.testing.assert_array_equal(crop, image[top : top + 12, left : left + 12])


def test_crop_posteriors_are_the_mean_over_crops_and_mirror_images():
    model = VGG(**SMALL, hidden=(16,), num_classes=10)
    variables = random_variables(model, 56, 56, 3)
    crops = np.random.default_rng(0).normal(size=(3, 56, 56, 3)).astype(np.float32)
    logits = jax.jit(model.apply)(variables, np.concatenate([crops, crops[:, :, ::-1]]))
    expected = np.mean([np.exp(row) / np.exp(row).sum() for row in np.asarray(logits, np.float64)], 0)
    np.testing.assert_allclose(
        jax.jit(evaluation.crop_posteriors, static_argnums=0)(model, variables, crops), expected, rtol=1e-5
    )


def test_errors_are_scikit_learns():
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    random = np.random.default_rng(0)
    posteriors = random.dirichlet(np.ones(20), 500)
    labels = random.integers(0, 20, 500)
    for k in (1, 5):
        expected = 1 - top_k_accuracy_score(labels, posteriors, k=k, labels=range(20))
        assert evaluation.top_k_error(posteriors, labels, k) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(
        evaluation.confusion_matrix(posteriors, labels),
        confusion_matrix(labels, posteriors.argmax(1), labels=range(20)),
    )


def test_the_scales_are_the_papers():
    jitter = DataConfig(train_view="scale_crop", train_scale=(256, 512))
    assert evaluate.scales(jitter, 256) == ("256-512", 384, (256, 384, 512))
    fixed = DataConfig(train_view="scale_crop", train_scale=(384, 384))
    assert evaluate.scales(fixed, 256) == ("384", 384, (352, 384, 416))
    assert evaluate.scales(DataConfig(), 256) == ("256", 256, (224, 256, 288))


# --- the command


# VGG-11 with all its pools and a head for one position: crops of 32 pixels.
TINY, TINY_PREPARE = dict(depth=11, pool_size=1, hidden=(16,)), Preprocessing(resize=36, crop=32)


def write_imagenet(path, count):
    """A data directory with so many validation images, and the weights of two networks for them."""
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
        save(path / f"{name}.safetensors", model, variables, TINY_PREPARE)
    return path


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), 21)


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    code = evaluate.main()
    return code, capsys.readouterr()


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.grid)])
def test_the_whole_table_and_fusion(count, tmp_path, monkeypatch, capsys):
    imagenet = write_imagenet(tmp_path, count)
    arguments = ("--data-dir", imagenet, "--scales", 32, 36, 40, "--batch-size", 4)
    for name, protocol in (("a", "dense"), ("b", "all")):
        output = ("--output", tmp_path / name, "--confusion", tmp_path / f"{name}.png")
        weights = ("--weights", imagenet / f"{name}.safetensors")
        code, printed = run((*weights, *arguments, *output, "--protocol", protocol), monkeypatch, capsys)
        assert code == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = [line.split("  ") for line in printed.out.splitlines()[-6:]]
    assert [cell.strip() for cell in rows[0] if cell] == [
        *("network", "train S", "test Q", "protocol", "top-1 error, %", "top-5 error, %", "paper, %")
    ]
    results = {
        protocol: evaluate.Result.load(str(tmp_path / "b" / f"{protocol}.npz")) for protocol in evaluate.PROTOCOLS
    }
    for result in results.values():
        np.testing.assert_allclose(result.posteriors.sum(1), 1, rtol=1e-5)
        assert result.labels.tolist() == [i % 7 for i in range(count)]
        top1 = 100 * evaluation.top_k_error(result.posteriors, result.labels, 1)
        assert any(result.protocol in line and f"{top1:.1f}" in line for line in printed.out.splitlines())
    both = (results["multi_scale"].posteriors + results["multi_crop"].posteriors) / 2
    np.testing.assert_allclose(results["dense+multi_crop"].posteriors, both, rtol=1e-5)
    assert results["multi_scale"].test_scales == (32, 36, 40)
    assert results["dense"].test_scales == (32,)
    assert np.abs(results["dense"].posteriors - results["centre_crop"].posteriors).max() > 1e-4

    files = [tmp_path / name / "dense.npz" for name in ("a", "b")]
    code, printed = run(("--fuse", *files), monkeypatch, capsys)
    assert code == 0
    a, b = (evaluate.Result.load(str(file)) for file in files)
    mean = (a.posteriors.astype(np.float64) + b.posteriors) / 2
    np.testing.assert_array_equal(evaluate.fused([str(file) for file in files])[0].posteriors, mean)
    assert f"{100 * evaluation.top_k_error(mean, a.labels, 5):.1f}" in printed.out


def test_each_image_has_its_own_posteriors(imagenet, tmp_path, monkeypatch, capsys):
    """Batches, of images of two sizes in turn, give what one image alone does."""
    weights = ("--weights", imagenet / "a.safetensors", "--data-dir", imagenet, "--protocol", "dense", "--scales", 36)
    for split, batch_size in (("validation[:9]", 2), ("validation[7:8]", 1)):
        output = ("--output", tmp_path / split, "--split", split, "--batch-size", batch_size)
        assert run((*weights, *output), monkeypatch, capsys)[0] == 0
    whole, alone = (
        evaluate.Result.load(str(tmp_path / split / "dense.npz")) for split in ("validation[:9]", "validation[7:8]")
    )
    np.testing.assert_allclose(whole.posteriors[7], alone.posteriors[0], rtol=1e-5)
    assert len(np.unique(whole.posteriors.round(6), axis=0)) == 9


def test_the_papers_figures_stand_beside_its_networks_only():
    def result(network, protocol, train_scale="256-512", data="imagenet2012/validation", classes=1000, scales=None):
        single, multi = paper.TEST_SCALES.get(train_scale, (300, (300,)))
        scales = scales or ((single,) if protocol == "dense" else multi)
        return evaluate.Result(np.ones((2, classes)), np.zeros(2, int), network, protocol, train_scale, scales, data)

    assert evaluate.published(result("D", "dense")) == "25.6/8.1"
    assert evaluate.published(result("E", "multi_scale", "256")) == "26.9/8.7"
    assert evaluate.published(result("D", "multi_crop")) == "24.6/7.5"
    assert evaluate.published(result("E", "dense+multi_crop")) == "24.4/7.1"
    for other in (
        result("D", "centre_crop"),
        result("D with batch norm", "dense"),
        result("D", "dense", "300"),
        result("D", "dense", data="imagenette/validation"),
        result("D", "dense", data="imagenet2012/validation[:100]"),
        result("D", "dense", classes=10),
        result("D", "dense", scales=(256,)),
        result("D", "multi_scale", scales=(384,)),
    ):
        assert evaluate.published(other) == ""
    assert evaluate.column(VGG(16, conv1x1=True)) == "C"
    assert evaluate.column(VGG(11, lrn=True)) == "A-LRN"
    assert evaluate.column(VGG(19, batch_norm=True)) == "E with batch norm"
    assert len(paper.SINGLE_SCALE) == 12
    assert len(paper.MULTI_SCALE) == 10


def test_the_fusion_of_d_and_e_has_the_papers_figure(tmp_path):
    files = []
    for network in ("D", "E"):
        result = evaluate.Result(
            np.ones((2, 1000), np.float32), np.zeros(2, int), network, "multi_crop", "256-512", (256, 384, 512),
            "imagenet2012/validation",
        )  # fmt: skip
        files.append(str(tmp_path / f"{network}.npz"))
        result.save(files[-1])
    fused, figure = evaluate.fused(files)
    assert (fused.network, figure) == ("D + E", "23.9/7.2")
    assert evaluate.fused(files[:1] * 2)[1] == ""


def test_mistakes_give_one_line(imagenet, tmp_path, monkeypatch, capsys):
    weights = ("--weights", imagenet / "a.safetensors", "--data-dir", imagenet)
    (tmp_path / "bad.npz").write_bytes(b"x")
    other = evaluate.Result(np.ones((3, 5)), np.zeros(3, int), "A", "dense", "256", (256,), "digits/test")
    other.save(str(tmp_path / "other.npz"))
    evaluate.Result(np.ones((2, 5)), np.zeros(2, int), "A", "dense", "256", (256,), "digits/test").save(
        str(tmp_path / "another.npz")
    )
    for arguments, line in (
        ((*weights, "--protocol", "dense", "--scales", 30), "the test scales are (30,); expected 32 or more"),
        ((*weights, "--batch-size", 0), "--batch-size is 0; expected 1 or more"),
        ((*weights, "--split", "test"), "split 'test' of imagenet2012/5.1.0 is missing or empty"),
        (("--fuse", tmp_path / "bad.npz"), "holds no posteriors that vgg_jax.evaluate saved"),
        (("--fuse", tmp_path / "nowhere.npz"), "nowhere.npz holds no posteriors"),
        (("--fuse", tmp_path / "other.npz", tmp_path / "another.npz"), "expected the images of"),
        ((*weights, "--output", tmp_path / "bad.npz"), "cannot write"),
    ):
        if "cannot write" in line:
            arguments += ("--split", "validation[:1]")
        code, printed = run(arguments, monkeypatch, capsys)
        (error,) = printed.err.splitlines()
        assert code == 2
        assert line in error
    with raises_user_error("holds no posteriors"):
        evaluate.Result.load(str(tmp_path))
