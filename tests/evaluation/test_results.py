"""The results of an evaluation: errors, scales, the paper's figures and fusion."""

import numpy as np
import pytest

from tests.conftest import raises_user_error
from vgg_jax import VGG
from vgg_jax.config import DataConfig
from vgg_jax.evaluation import published, results
from vgg_jax.evaluation.matching import network_labels
from vgg_jax.training.class_names import output_names
from vgg_jax.weights.imagenet_classes import imagenet_synsets


def test_errors_are_scikit_learns():
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    random = np.random.default_rng(0)
    posteriors = random.dirichlet(np.ones(20), 500)
    labels = random.integers(0, 20, 500)
    for k in (1, 5):
        expected = 1 - top_k_accuracy_score(labels, posteriors, k=k, labels=range(20))
        assert results.top_k_error(posteriors, labels, k) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(
        results.confusion_matrix(posteriors, labels),
        confusion_matrix(labels, posteriors.argmax(1), labels=range(20)),
    )


def test_scales_are_the_papers():
    jitter = DataConfig(train_view="scale_crop", train_scale=(256, 512))
    assert results.scales(jitter, 256) == ("256-512", 384, (256, 384, 512))
    fixed = DataConfig(train_view="scale_crop", train_scale=(384, 384))
    assert results.scales(fixed, 256) == ("384", 384, (352, 384, 416))
    assert results.scales(DataConfig(), 256) == ("256", 256, (224, 256, 288))


def test_only_networks_of_the_paper_have_its_figures():
    def result(network, protocol, train_scale="256-512", data="imagenet2012/validation", classes=1000, scales=None):
        single, multi = published.TEST_SCALES.get(train_scale, (300, (300,)))
        scales = scales or ((single,) if protocol == "dense" else multi)
        return results.Result(np.ones((2, classes)), np.zeros(2, int), network, protocol, train_scale, scales, data)

    assert results.published_figure(result("D", "dense")) == "25.6/8.1"
    assert results.published_figure(result("E", "multi_scale", "256")) == "26.9/8.7"
    assert results.published_figure(result("D", "multi_crop")) == "24.6/7.5"
    assert results.published_figure(result("E", "dense+multi_crop")) == "24.4/7.1"
    for other in (
        result("D", "center_crop"),
        result("D with batch norm", "dense"),
        result("D", "dense", "300"),
        result("D", "dense", data="imagenette/validation"),
        result("D", "dense", data="imagenet2012/validation[:100]"),
        result("D", "dense", classes=10),
        result("D", "dense", scales=(256,)),
        result("D", "multi_scale", scales=(384,)),
    ):
        assert results.published_figure(other) == ""
    assert results.column(VGG(16, conv1x1=True)) == "C"
    assert results.column(VGG(11, lrn=True)) == "A-LRN"
    assert results.column(VGG(19, batch_norm=True)) == "E with batch norm"
    assert len(published.SINGLE_SCALE) == 12
    assert len(published.MULTI_SCALE) == 10


def test_fusion_of_d_and_e_has_the_papers_figure(tmp_path):
    files = []
    for network in ("D", "E"):
        result = results.Result(
            np.ones((2, 1000), np.float32), np.zeros(2, int), network, "multi_crop", "256-512", (256, 384, 512),
            "imagenet2012/validation",
        )  # fmt: skip
        files.append(str(tmp_path / f"{network}.npz"))
        result.save(files[-1])
    fused, figure = results.fused(files)
    assert (fused.network, figure) == ("D + E", "23.9/7.2")
    assert results.fused(files[:1] * 2)[1] == ""


def test_confusion_matrix_shows_the_class_names(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), savefig(figure, *a, **k)))
    names = ("2", "café")
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]], np.float32)
    result = results.Result(scores, np.array([0, 1, 1]), "A", "dense", "256", (256,), "pets/test", names)
    results.draw_confusion(result, str(tmp_path / "a.png"))
    left, right, *_ = figures[0].axes
    for labels in (left.get_xticklabels(), left.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(names)
    assert [label.get_text() for label in right.get_yticklabels()][-1] == "café"  # half of its images are wrong


def test_unused_outputs_do_not_prevent_a_fusion(tmp_path):
    files = []
    for names in (("cat", "dog", "unused output 2"), ("cat", "dog"), ("cat", "emu")):
        result = results.Result(np.ones((2, 3), np.float32), np.zeros(2, int), "A", "dense", "32", (32,), "pets/test")
        result.classes = names
        files.append(str(tmp_path / f"{len(files)}.npz"))
        result.save(files[-1])
    assert results.fused(files[:2])[0].classes == ("cat", "dog", "unused output 2")
    with raises_user_error("2.npz has 'emu' as class 1; expected 'dog'"):
        results.fused(files)


def test_synsets_are_found_beside_unused_outputs():
    names = output_names(imagenet_synsets(), 1001)
    assert network_labels("photos/test", ("n01443537", "n01440764"), names) == (1, 0)


def test_other_files_are_refused(tmp_path):
    with raises_user_error("is not a file of posteriors from vgg-jax evaluate"):
        results.Result.load(str(tmp_path))
