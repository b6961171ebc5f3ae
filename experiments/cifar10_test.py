"""The evaluation of a finished run on the test images of CIFAR-10, with and without the horizontal flip.

It happens once: the posteriors are kept beside the run, and read from there the next time.
"""

import hashlib
import json
import os
from typing import Any

from vgg_jax import load
from vgg_jax.data.dataset import open_split
from vgg_jax.evaluation.posteriors import evaluate_split
from vgg_jax.evaluation.results import Result, confusion_matrix, right
from vgg_jax.runtime import configure

VIEWS = {"plain": False, "flip": True}  # by name, whether the logits of the horizontal flip are added
BATCH = 500


def test_figures(workdir: str, folder: str) -> dict[str, Any]:
    """Return the accuracies of a run on the test images, by class too, and the confusion matrices."""
    configure()
    found: dict[str, Any] = {}
    for view, flip in VIEWS.items():
        path = f"{workdir}.test_{view}.npz"
        if not os.path.exists(path):
            net = load(workdir)
            split: Any = open_split(os.path.abspath(folder), "test", data_dir="", class_split="test")
            assert net.classes == split.class_names
            scales = ("32", 32, (32,))
            preprocessing = net.checked_preprocessing()
            (result,) = evaluate_split(
                net.model, net.variables, preprocessing, split, ("center_crop",), scales, BATCH, flip=flip
            )
            result.classes = split.class_names
            result.save(path)
        found[view] = _figures(Result.load(path))
    return found


def _figures(result: Result) -> dict[str, Any]:
    """Return the accuracy, that of each class, and the counts of the images by true and predicted class."""
    matrix = confusion_matrix(result.posteriors, result.labels)
    per_class = matrix.diagonal() / matrix.sum(1)
    return {
        "accuracy": float(right(result).mean()),
        "images": len(result.labels),
        "per_class": dict(zip(result.classes, per_class.tolist(), strict=True)),
        "confusion": matrix.tolist(),
    }


def save_network(workdir: str, card: dict[str, Any]) -> dict[str, Any]:
    """Save a run as `workdir`.safetensors with a card beside it; return the card with the SHA-256 of the file."""
    path = workdir + ".safetensors"
    if not os.path.exists(path):
        load(workdir).save(path)
    with open(path, "rb") as file:
        card = {"file": os.path.basename(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest(), **card}
    with open(workdir + ".card.json", "w") as file_of_card:
        json.dump(card, file_of_card, indent=1)
    return card
