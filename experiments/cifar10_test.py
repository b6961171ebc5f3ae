"""The evaluation of a finished run on the test images of CIFAR-10, with and without the horizontal flip.

It happens once: the posteriors are kept beside the run, and read from there the next time.
"""

import hashlib
import json
import os
import shutil
from typing import Any

from experiments.cifar10_runs import SOURCE
from experiments.environment import environment
from vgg_jax import load
from vgg_jax.data.dataset import open_split
from vgg_jax.evaluation.posteriors import evaluate_split
from vgg_jax.evaluation.results import Result, confusion_matrix, right
from vgg_jax.export.card import Measured
from vgg_jax.runtime import configure

VIEWS = {"plain": False, "flip": True}  # by name, whether the logits of the horizontal flip are added
VIEWS_IN_WORDS = {"plain": "one view", "flip": "with the horizontal flip"}
OF_THE_CARD = ("python", "jax", "flax")
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
    """Save a run as `workdir`.safetensors with its figures beside it, and as a folder with a model card.

    The folder is `workdir`-network, ready for `Network.push_to_hub` or `hf upload`.

    Args:
      workdir: the directory of the run.
      card: the settings of the run, and `test_accuracy` by the names of VIEWS.

    Returns:
      The card with the SHA-256 of the .safetensors file.
    """
    path, net = workdir + ".safetensors", load(workdir)
    if not os.path.exists(path):
        net.save(path)
    with open(path, "rb") as file:
        card = {"file": os.path.basename(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest(), **card}
    with open(workdir + ".card.json", "w") as file_of_card:
        json.dump(card, file_of_card, indent=1)
    folder = workdir + "-network"
    shutil.rmtree(folder, ignore_errors=True)
    net.save(folder + os.sep, measured=measured(card))
    return card


def measured(card: dict[str, Any]) -> Measured:
    """Return the figures of a run for its model card: the accuracy on the test images by view, and the settings."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name in OF_THE_CARD)
    other = {name: value for name, value in card.items() if name not in ("test_accuracy", "file", "sha256")}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in other.items()}
    return Measured(
        dataset=SOURCE,
        split="the test images, evaluated once at the end",
        accuracy={VIEWS_IN_WORDS[view]: accuracy for view, accuracy in card["test_accuracy"].items()},
        command=found["command"],
        machine=f"{found['machine']}; {versions}",
        details={name.replace("_", " "): text for name, text in texts.items()},
    )
