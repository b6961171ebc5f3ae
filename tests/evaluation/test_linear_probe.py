"""`evaluation.linear_probe` beside scikit-learn and SciPy."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import sklearn.datasets
import sklearn.linear_model
import sklearn.preprocessing
import sklearn.svm

from tests.conftest import raises_user_error
from vgg_jax.evaluation.embedding_files import Embeddings
from vgg_jax.evaluation.linear_probe import fit_probe, probe_files, wilson_interval

DIGITS = sklearn.datasets.load_digits()
FEATURES = DIGITS.data.astype(np.float32)
LABELS = DIGITS.target.astype(np.int32)
TRAIN, TEST = np.arange(1797) % 3 > 0, np.arange(1797) % 3 == 0
DESCRIPTION = {"weights": "a", "view": {}, "preprocessing": {}, "network": {}, "class_names": [], "images": "1"}
SOLVERS = {
    "svm": lambda c: sklearn.svm.LinearSVC(C=c, dual=False, max_iter=2000),
    "logistic": lambda c: sklearn.linear_model.LogisticRegression(C=c, max_iter=2000),
}


def embeddings(chosen, **changes):
    features = {"pool5": FEATURES[chosen]}
    return Embeddings(features, list(map(str, np.flatnonzero(chosen))), LABELS[chosen], {**DESCRIPTION, **changes})


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (7, 10), (8800, 10_000)])
def test_interval_equals_scipy(correct, total):
    expected = scipy.stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("classifier", ["svm", pytest.param("logistic", marks=pytest.mark.slow)])
def test_probe_equals_scikit_learn(classifier):
    probe = fit_probe(
        *(FEATURES[TRAIN], LABELS[TRAIN], FEATURES[TEST], LABELS[TEST], 10, classifier), strengths=(0.01, 1.0)
    )
    train, test = (sklearn.preprocessing.normalize(FEATURES[chosen]) for chosen in (TRAIN, TEST))
    expected = SOLVERS[classifier](1.0).fit(train, LABELS[TRAIN]).predict(test) == LABELS[TEST]
    assert probe.strength == 1.0 and probe.held_out[1.0] > probe.held_out[0.01]
    assert abs(probe.correct - expected.sum()) <= 1
    assert probe.per_class[3] == pytest.approx(expected[LABELS[TEST] == 3].mean(), abs=0.02)


def test_held_out_share_is_equal_for_each_class(monkeypatch):
    fitted = []

    class Constant:
        def __init__(self, **options):
            pass

        def fit(self, features, labels):
            fitted.append(labels)
            return self

        def predict(self, features):
            return np.zeros(len(features), np.int32)

    monkeypatch.setattr("sklearn.svm.LinearSVC", Constant)
    labels = np.repeat([0, 1, 2], [10, 20, 5]).astype(np.int32)
    features = np.eye(35, dtype=np.float32)
    probe = fit_probe(features, labels, features, labels, 3, strengths=(10.0, 1.0))
    assert [np.bincount(found).tolist() for found in fitted] == [[8, 16, 4], [8, 16, 4], [10, 20, 5]]
    assert probe.strength == 1.0  # the smallest of equal ones
    assert (probe.correct, probe.total) == (10, 35)


def test_files_give_the_probe_of_their_arrays():
    arrays = FEATURES[TRAIN], LABELS[TRAIN], FEATURES[TEST], LABELS[TEST]
    expected = fit_probe(*arrays, 10, strengths=(1.0,))
    found = probe_files(embeddings(TRAIN), embeddings(TEST, images="2"), strengths=(1.0,))
    assert found == expected


def test_files_that_do_not_fit_are_refused():
    train, test = embeddings(TRAIN), embeddings(TEST, images="2")
    for changed, part in (
        (embeddings(TEST, images="2", weights="b"), "have different weights"),
        (embeddings(TEST, images="2", view={"pool": "max"}), "have different view"),
        (train, "are of the same images"),
        (dataclasses.replace(test, labels=None), "no labels"),
        (dataclasses.replace(test, labels=np.zeros((599, 2), np.float32)), "several labels"),
    ):
        with raises_user_error(part):
            probe_files(train, changed)
    with raises_user_error("found no layer fc7; expected one of pool5"):
        probe_files(train, test, "fc7")
    both = {"pool4": FEATURES[TRAIN], "pool5": FEATURES[TRAIN]}
    with raises_user_error("choose it with --layer"):
        probe_files(dataclasses.replace(train, features=both), test)


def test_one_image_of_a_class_is_refused():
    features = np.eye(3, dtype=np.float32)
    labels = np.array([0, 0, 1], np.int32)
    with raises_user_error("class 1 has one training image"):
        fit_probe(features, labels, features, labels, 2)
    assert fit_probe(features, labels, features, labels, 2, strengths=(100.0,)).total == 3
