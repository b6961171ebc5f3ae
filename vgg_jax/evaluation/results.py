"""Results of an evaluation: saved posteriors, the table of errors, fusion and the confusion matrix."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from vgg_jax.config import DataConfig
from vgg_jax.errors import UserError, require
from vgg_jax.evaluation import published
from vgg_jax.look import picture
from vgg_jax.model import VGG

MOST_TICKS = 30  # classes whose names the confusion matrix has room for


@dataclasses.dataclass
class Result:
    """The result of one network under one protocol."""

    posteriors: Float[np.ndarray, "n classes"]
    labels: Shaped[np.ndarray, "n *k"]  # (N,) classes; (N, K) zeros and ones for K classes, or K numbers
    network: str  # the paper's column, and how the network differs from it
    protocol: str
    train_scale: str  # the paper's S, for example 256, or 256-512 for scale jitter
    test_scales: tuple[int, ...]  # the paper's Q
    data: str  # dataset/split
    classes: tuple[str, ...] = ()  # the names of the network's classes; () if they are unknown
    outputs: str = "softmax"  # what the network's outputs mean; for values, `posteriors` are the numbers themselves

    def save(self, path: str) -> None:
        """Write an .npz file, which appears complete or not at all.

        Raises:
          UserError: if it cannot be written.
        """
        description = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(path + ".partial", "wb") as file:
                text = np.array(json.dumps(description))
                np.savez(file, posteriors=self.posteriors, labels=self.labels, description=text)
            os.replace(path + ".partial", path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(path + ".partial")
            raise UserError(f"cannot write {path}: {error}; choose another place with --output") from None

    @classmethod
    def load(cls, path: str) -> "Result":
        """Return the result in a file that `save` wrote.

        Raises:
          UserError: if the file is not of that kind.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                description = json.loads(str(file["description"]))
                for name in ("test_scales", "classes"):
                    description[name] = tuple(description.get(name, ()))
                return cls(file["posteriors"], file["labels"], **description)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a file of posteriors from vgg-jax evaluate: {error}") from None


def column(model: VGG) -> str:
    """Return the paper's name of a network, with " with batch norm" added if the network has it."""
    return model.column + (" with batch norm" if model.batch_norm else "")


def scales(data: DataConfig, resize: int, smallest: int = 0) -> tuple[str, int, tuple[int, ...]]:
    """Return the scales that the paper would use for a network, or larger ones that the network can take.

    Args:
      data: the data of its training.
      resize: the short side of its test view, for a network that was not trained on scaled crops.
      smallest: the smallest test scale of the network. If S is smaller, Q starts there. If only S minus the step is
        smaller, the scales are Q, Q + step, Q + 2 step.

    Returns:
      The training scale S, the test scale Q of single-scale evaluation, and the test scales of multi-scale evaluation.
    """
    if data.train_view == "scale_crop" and data.train_scale[0] < data.train_scale[1]:
        low, high = data.train_scale
        test = [max(side, smallest) for side in (low, (low + high) // 2, high)]
        return f"{low}-{high}", test[1], tuple(dict.fromkeys(test))
    side = data.train_scale[0] if data.train_view == "scale_crop" else resize
    step = 32 if side >= 256 else max(side // 8, 1)  # the paper's 32; in proportion for small images
    single = max(side, smallest)
    first = single - step if single - step >= smallest else single
    return str(side), single, (first, first + step, first + 2 * step)


def table(results: Sequence[tuple[Result, str]]) -> str:
    """Return the errors as text, in the layout of the paper's Tables 3 to 6.

    Args:
      results: pairs of a result and the paper's figure, which is "" if there is none.
    """
    figures = [_figures(result) for result, _ in results]
    rows = [("network", "train S", "test Q", "protocol", *figures[0], "paper, %")]
    for (result, paper), numbers in zip(results, figures, strict=True):
        q = ", ".join(map(str, result.test_scales))
        rows.append((result.network, result.train_scale, q, result.protocol, *numbers.values(), paper))
    return _aligned(rows)


def _figures(result: Result) -> dict[str, str]:
    """Return the figures of a result by their headings: errors of classes, of several labels, or of numbers."""
    if result.outputs == "values":
        return {"rmse": f"{np.sqrt(np.mean((result.posteriors - result.labels) ** 2)):.4f}"}
    if result.labels.ndim == 2:
        return {"error of the labels, %": f"{100 - 100 * right(result).mean():.1f}"}
    errors = [100 * top_k_error(result.posteriors, result.labels, k) for k in (1, 5)]
    return {"top-1 error, %": f"{errors[0]:.1f}", "top-5 error, %": f"{errors[1]:.1f}"}


def right(result: Result) -> Shaped[np.ndarray, "n *k"]:
    """Return whether each image has the right class, (N,), or each of several labels is on the right side of 1/2."""
    if result.labels.ndim == 2:
        return np.equal(result.posteriors > 0.5, result.labels > 0.5)
    return np.asarray(result.posteriors.argmax(1) == result.labels)


def class_table(result: Result) -> str:
    """Return a line for each class as text: its name, its number of images, and their accuracy.

    With several labels for each image, a class has the images with its label, and its accuracy is over all images.

    Args:
      result: the result of a network whose outputs are classes. Without names, classes are numbers.

    Raises:
      UserError: if the outputs are values.
    """
    if result.outputs == "values":
        raise UserError("the network's outputs are values; expected classes: leave out --per-class")
    correct, rows = right(result), [("class", "images", "accuracy, %")]
    for label in range(result.posteriors.shape[1]):
        several = result.labels.ndim == 2
        images = result.labels[:, label] > 0.5 if several else result.labels == label
        found = correct[:, label] if several else correct[images]
        rows.append((_class_name(result, label), str(images.sum()), f"{100 * found.mean():.1f}" if len(found) else "-"))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def published_figure(result: Result) -> str:
    """Return the paper's errors for the same network, scales and protocol on ImageNet's validation images, or ""."""
    if result.data != "imagenet2012/validation" or result.posteriors.shape[1] != 1000:
        return ""
    single, multi = published.TEST_SCALES.get(result.train_scale, (0, ()))
    if result.test_scales != ((single,) if result.protocol == "dense" else multi):
        return ""
    figures = {
        "dense": published.SINGLE_SCALE,
        "multi_scale": published.MULTI_SCALE,
        "multi_crop": published.MULTI_CROP,
        "dense+multi_crop": published.DENSE_AND_MULTI_CROP,
    }.get(result.protocol, {})
    return figures.get((result.network, result.train_scale), "")


def fused(paths: Sequence[str]) -> tuple[Result, str]:
    """Return the fusion of saved results: the mean of their posteriors.

    Args:
      paths: files that `Result.save` wrote.

    Returns:
      The fused result, and the paper's figure, or "" if the paper does not have this fusion.

    Raises:
      UserError: if a file cannot be read, or the results are not of the same images.
    """
    results = [Result.load(path) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        same = result.posteriors.shape == first.posteriors.shape and np.array_equal(result.labels, first.labels)
        if not same or (result.data, result.outputs) != (first.data, first.outputs):
            raise UserError(f"{path} is of {result.data}, {result.posteriors.shape}; expected the images of {paths[0]}")
        # One list may be longer, by the unused outputs of a network that states them.
        for i, (name, expected) in enumerate(zip(result.classes, first.classes, strict=False)):
            if name != expected:
                raise UserError(
                    f"{path} has {name!r} as class {i}; expected {expected!r}, as in {paths[0]}: fuse networks with "
                    "the same classes"
                )
    protocols = " + ".join(dict.fromkeys(result.protocol for result in results))
    network = " + ".join(result.network for result in results)
    joined = dataclasses.replace(
        first, posteriors=fuse([result.posteriors for result in results]), network=network, protocol=protocols
    )
    jittered = {(result.network, result.train_scale) for result in results} == {("D", "256-512"), ("E", "256-512")}
    return joined, published.FUSION.get(protocols, "") if all(map(published_figure, results)) and jittered else ""


def draw_confusion(result: Result, path: str) -> None:
    """Draw the confusion matrix and the ten classes with the largest errors.

    Args:
      result: the result to draw.
      path: the picture file to write.

    Raises:
      UserError: if matplotlib is not installed, the file cannot be written, or an image has no single class.
    """
    require("matplotlib", "train")
    matrix, counts, errors = _class_errors(result)
    worst = _worst_classes(counts, errors)[::-1]  # the worst at the top
    try:
        with picture(path, (11, 5), dpi=100) as figure:
            left, right = figure.subplots(1, 2, width_ratios=(3, 2))
            _draw_matrix(left, matrix / np.maximum(counts, 1)[:, None], result)
            right.barh(range(len(worst)), 100 * errors[worst])
            right.set_yticks(range(len(worst)), [_class_name(result, i) for i in worst])
            right.set(xlabel="top-1 error, %", ylabel="class", title="the classes with the most errors", xlim=(0, 100))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another file with --confusion") from None


def _draw_matrix(axes: Any, shares: np.ndarray, result: Result) -> None:
    """Draw the shares of the predicted classes in each true class."""
    from matplotlib.ticker import MaxNLocator  # here, because only this function needs it

    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{result.network}, {result.protocol}")
    if result.classes and len(result.classes) <= MOST_TICKS:
        axes.set_xticks(range(len(result.classes)), result.classes, rotation=90)
        axes.set_yticks(range(len(result.classes)), result.classes)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(shown, ax=axes, label="share of the true class")


def worst_classes(result: Result) -> str:
    """Return the ten classes with the largest errors as text, each with the class that it is most often taken for."""
    matrix, counts, errors = _class_errors(result)
    rows = [("class", "images", "top-1 error, %", "most often taken for")]
    for i in _worst_classes(counts, errors):
        others = matrix[i].copy()
        others[i] = 0
        taken_for = _class_name(result, int(others.argmax())) if others.any() else ""
        rows.append((_class_name(result, i), str(counts[i]), f"{100 * errors[i]:.1f}", taken_for))
    return _aligned(rows)


def _class_errors(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the confusion matrix, and the number of images and the top-1 error of each class."""
    if result.labels.ndim == 2:
        raise UserError(
            f"{result.data} has several labels or numbers for each image; expected one class: leave out --confusion"
        )
    matrix = confusion_matrix(result.posteriors, result.labels)
    counts = matrix.sum(1)
    return matrix, counts, 1 - matrix.diagonal() / np.maximum(counts, 1)


def _worst_classes(counts: np.ndarray, errors: np.ndarray) -> list[int]:
    """Return at most ten labels with images, by falling error."""
    (present,) = np.nonzero(counts)
    return [int(i) for i in present[np.argsort(-errors[present], kind="stable")][:10]]


def _class_name(result: Result, label: int) -> str:
    return result.classes[label] if label < len(result.classes) else str(label)


def fuse(posteriors: Iterable[Float[np.ndarray, "n classes"]]) -> Float[np.ndarray, "n classes"]:
    """Return the mean of several arrays of posteriors, in float64.

    Args:
      posteriors: arrays (N, num_classes), of several networks or scales.

    Returns:
      (N, num_classes) float64.
    """
    arrays = [np.asarray(array, np.float64) for array in posteriors]
    return np.asarray(np.mean(arrays, axis=0))


def top_k_error(posteriors: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], k: int) -> float:
    """Return the share of examples whose label is not among the k most probable classes.

    Tie-breaking: of equally probable classes, the lower one comes first.

    Args:
      posteriors: (N, num_classes).
      labels: (N,) integers.
      k: the number of classes that count.
    """
    best = np.argsort(-posteriors, axis=1, kind="stable")[:, :k]
    return float(1 - (best == labels[:, None]).any(1).mean())


def confusion_matrix(
    posteriors: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, "classes classes"]:
    """Return how often each true class (row) was predicted as each class (column).

    Args:
      posteriors: (N, num_classes).
      labels: (N,) integers.

    Returns:
      (num_classes, num_classes) counts.
    """
    classes = posteriors.shape[1]
    pairs = labels * classes + posteriors.argmax(1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
