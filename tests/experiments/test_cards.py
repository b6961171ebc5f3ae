"""The experiments write a model card with the measured figures of a run."""

import hashlib
import json
import sys

import huggingface_hub
import jax

from experiments import cifar10_test
from vgg_jax import CIFAR10, VGG, Network, load
from vgg_jax.export import folders


def test_run_is_saved_with_a_card_of_its_figures(narrow, tmp_path, monkeypatch):
    """The folder of a network stands for the directory of a run: `load` reads both."""
    monkeypatch.setattr(sys, "argv", ["experiments/cifar10_final.py", "/data/cifar", "--runs-dir", "/runs/final"])
    run = str(tmp_path / "vgg11")
    model = VGG(depth=11, num_classes=3, pool_size=1, hidden=())
    variables = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
    Network(model, variables, CIFAR10, classes=("cat", "dog", "ship")).save(run + "/")
    settings = {"seed": 0, "epochs": 25, "test_accuracy": {"plain": 0.9, "flip": 0.925}}
    for _ in range(2):  # the second time, the folder of the first is replaced
        card = cifar10_test.save_network(run, settings)
    written = hashlib.sha256((tmp_path / "vgg11.safetensors").read_bytes()).hexdigest()
    assert card["sha256"] == written == json.loads((tmp_path / "vgg11.card.json").read_text())["sha256"]
    text = (tmp_path / "vgg11-network" / folders.CARD).read_text()
    results = huggingface_hub.ModelCard(text).data.eval_results
    assert [(found.metric_value, found.metric_name) for found in results] == [
        (90, "accuracy, one view"),
        (92.5, "accuracy, with the horizontal flip"),
    ]
    for line in ("| epochs | 25 |", "python experiments/cifar10_final.py cifar --runs-dir final"):
        assert line in text.splitlines(), line
    assert load(run + "-network").classes == ("cat", "dog", "ship")
