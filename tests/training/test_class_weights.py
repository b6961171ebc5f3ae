"""Class weights: scikit-learn's balanced ones, and the weighted loss of PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from vgg_jax.training.losses import balanced_weights, class_sums, mean_loss

WEIGHTS = (0.5, 2.0, 1.0, 3.0)


def test_balanced_weights_equal_scikit_learn():
    labels = np.random.default_rng(0).choice(4, 200, p=[0.6, 0.25, 0.1, 0.05])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 4), expected, rtol=1e-15)
    assert balanced_weights(labels, 6)[4:] == (0.0, 0.0)
    np.testing.assert_allclose(balanced_weights(labels, 6)[:4], expected, rtol=1e-15)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_weighted_loss_equals_pytorch(soft, label_smoothing, x64):
    random = np.random.default_rng(1)
    logits = random.normal(size=(7, 4))
    labels = random.dirichlet(np.ones(4), 7) if soft else random.integers(0, 4, 7)
    reference = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double(), label_smoothing=label_smoothing)
    expected = float(reference(torch.from_numpy(logits), torch.from_numpy(labels)))
    ours = mean_loss(jnp.asarray(logits), jnp.asarray(labels), "softmax", label_smoothing, WEIGHTS)
    assert float(ours) == pytest.approx(expected, rel=1e-12)


def test_class_sums_count_each_class():
    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    sums = class_sums(logits, jnp.array([0, 1, 1, 2]), jnp.array([1.0, 1.0, 1.0, 0.0]))
    assert sums["class_correct"].tolist() == [1, 1, 0]
    assert sums["class_count"].tolist() == [1, 2, 0]
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    several = class_sums(logits, labels, jnp.ones(4), "sigmoid")
    assert several["class_correct"].tolist() == [4, 2, 4]
    assert several["class_count"].tolist() == [4, 4, 4]
