"""A linear classifier on frozen features, as in appendix B of the paper, by scikit-learn."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from vgg_jax.errors import UserError, require
from vgg_jax.evaluation.embedding_files import Embeddings

CLASSIFIERS = ("svm", "logistic")
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # candidates for C, of features with norm 1
HELD_OUT = 0.2  # share of the training images on which C is chosen
NORMAL_95 = 1.959963984540054  # the 97.5th percentile of the normal distribution
MOST_ITERATIONS = 2000

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of a linear probe."""

    correct: int  # test images whose class is predicted
    total: int  # test images
    strength: float  # the chosen C
    held_out: dict[float, float]  # from each C to the accuracy on the held-out training images
    per_class: tuple[float, ...]  # the accuracy of each class; NaN for a class without test images

    @property
    def accuracy(self) -> float:
        """Return the accuracy on the test images, from 0 to 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Return the lower and upper bound of the 95 % interval of the accuracy, by Wilson's score (1927)."""
        return wilson_interval(self.correct, self.total)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score, which stays in [0, 1] for small numbers too.

    Args:
      correct: the number of hits.
      total: the number of trials, at least 1.

    Source:
      Wilson, Journal of the American Statistical Association 22 (1927).
    """
    share, z2 = correct / total, NORMAL_95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def fit_probe(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m c"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    classifier: str = "svm",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Probe:
    """Train a linear classifier on L2-normalized features, and test it.

    C is the one with the highest accuracy on a fifth of the training images, drawn at random with equal shares of each
    class; of several, the smallest. The classifier is then trained on all training images.

    Args:
      features: (N, C) of the training images, float32 or float64.
      labels: (N,) their classes, integers from 0 to `num_classes` - 1.
      test_features: (M, C) of the test images, which only the last step uses.
      test_labels: (M,) their classes, likewise.
      num_classes: the number of classes.
      classifier: svm (LinearSVC, one class against the rest, squared hinge loss) or logistic (LogisticRegression).
      strengths: candidates for C, the inverse strength of the L2 regularization; with one, nothing is held out.
      seed: seed of the draw and of the solver.
      report: called with a line for each C, and for a solver that did not converge.

    Returns:
      The chosen C and the accuracies.

    Raises:
      UserError: if scikit-learn is missing, the classifier is unknown, C is not positive, or C is to be chosen and a
        class has only one training image.

    Source:
      Appendix B of the paper; the classifiers are those of scikit-learn.
    """
    require("sklearn", "extract")
    if classifier not in CLASSIFIERS:
        raise UserError(f"the classifier is {classifier!r}; expected one of {', '.join(CLASSIFIERS)}")
    if not strengths or min(strengths) <= 0:
        raise UserError(f"C is {tuple(strengths)}; expected one or several positive numbers")
    features, test_features = normalized_rows(features), normalized_rows(test_features)
    held_out: dict[float, float] = {}
    if len(strengths) > 1:
        kept = _kept_images(labels, seed)
        for strength in sorted(strengths):
            model = _fitted(classifier, strength, features[kept], labels[kept], seed, report)
            held_out[strength] = float((model.predict(features[~kept]) == labels[~kept]).mean())
            report(f"C {strength:g}  held-out accuracy {held_out[strength]:.2%}")
    best = max(held_out, key=lambda strength: held_out[strength]) if held_out else strengths[0]
    model = _fitted(classifier, best, features, labels, seed, report)
    hits = model.predict(test_features) == test_labels
    per_class = [
        float(hits[test_labels == c].mean()) if (test_labels == c).any() else math.nan for c in range(num_classes)
    ]
    return Probe(int(hits.sum()), len(hits), best, held_out, tuple(per_class))


def normalized_rows(features: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Return features divided by their L2 norms; zeros stay zeros."""
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    scaled: np.ndarray = (features / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled


def _kept_images(labels: Int[np.ndarray, " n"], seed: int) -> Shaped[np.ndarray, " n"]:
    """Return which images remain for training while C is chosen.

    Raises:
      UserError: if a class has less than two images.
    """
    random = np.random.default_rng(seed)
    kept = np.ones(len(labels), bool)
    for label in np.unique(labels):
        (found,) = np.nonzero(labels == label)
        if len(found) < 2:
            raise UserError(
                f"class {label} has one training image; expected two or more to choose C on held-out images: pass one "
                "C, or add images"
            )
        kept[random.permutation(found)[: max(1, round(len(found) * HELD_OUT))]] = False
    return kept


def _fitted(
    classifier: str, strength: float, features: np.ndarray, labels: np.ndarray, seed: int, report: Report
) -> Any:
    """Return the trained classifier; report if its solver did not converge."""
    if classifier == "svm":
        # The primal problem is faster unless there are fewer images than features.
        kind, options = require("sklearn.svm", "extract").LinearSVC, {"dual": len(features) < features.shape[1]}
    else:
        kind, options = require("sklearn.linear_model", "extract").LogisticRegression, {}
    category = require("sklearn.exceptions", "extract").ConvergenceWarning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        model = kind(C=strength, random_state=seed, max_iter=MOST_ITERATIONS, **options).fit(features, labels)
    if any(issubclass(warning.category, category) for warning in caught):
        report(f"C {strength:g}  not converged after {MOST_ITERATIONS} iterations")
    return model


def probe_files(
    train: Embeddings,
    test: Embeddings,
    layer: str | None = None,
    classifier: str = "svm",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Probe:
    """Train a linear classifier on the features of one file, and test it on those of another.

    Args:
      train: features and labels of the training images.
      test: features and labels of the test images.
      layer: the layer; may be None if the files have one.
      classifier: as for `fit_probe`.
      strengths: as for `fit_probe`.
      seed: as for `fit_probe`.
      report: as for `fit_probe`.

    Raises:
      UserError: if the files differ in weights, views, preprocessing or classes, have no single label for each image,
        or lack the layer; also as `fit_probe`.
    """
    for name in ("weights", "view", "preprocessing", "network", "class_names"):
        if train.description[name] != test.description[name]:
            raise UserError(
                f"the training and the test features have different {name}; expected the same: extract both with the "
                "same command except for the images"
            )
    if train.description["images"] == test.description["images"]:
        raise UserError("the training and the test features are of the same images; expected two splits: extract both")
    layers = list(train.features)
    if layer is None and len(layers) > 1:
        raise UserError(f"the files have the layers {', '.join(layers)}; expected one: choose it with --layer")
    layer = layer or layers[0]
    if layer not in train.features or layer not in test.features:
        raise UserError(f"found no layer {layer}; expected one of {', '.join(layers)} in both files: extract it")
    samples = *_samples(train, layer, "training"), *_samples(test, layer, "test")
    return fit_probe(*samples, _num_classes(train, test), classifier, strengths, seed, report)


def _samples(embeddings: Embeddings, layer: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the features (N, C) and the classes (N,); raise UserError if the labels are of another kind."""
    labels = embeddings.labels
    if labels is None or labels.ndim > 1:
        found = "no labels" if labels is None else "several labels or numbers for each image"
        raise UserError(f"the {what} features have {found}; expected one class for each: extract a class folder")
    features = embeddings.features[layer]
    return features.reshape(len(features), -1), labels


def _num_classes(train: Embeddings, test: Embeddings) -> int:
    assert train.labels is not None and test.labels is not None  # `_samples` has checked them
    return max(len(train.class_names), int(train.labels.max()) + 1, int(test.labels.max()) + 1)
