"""Losses, metrics and whole runs of outputs that are not one class: several labels, and numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

from tests.conftest import raises_user_error, write_tfds
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.inputs import open_splits
from vgg_jax.training.loop import train_and_evaluate
from vgg_jax.training.losses import example_losses, share_right
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.metrics import MetricAverages, evaluation_error
from vgg_jax.training.run_weights import load_run
from vgg_jax.training.state import TrainState
from vgg_jax.training.validation import check_config, check_data


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "squared_error"])
def test_losses_and_gradients_are_pytorchs(loss, x64):
    import torch

    random = np.random.default_rng(0)
    logits = 5 * random.normal(size=(16, 7))
    labels = {
        "softmax": random.integers(0, 7, 16),
        "sigmoid": random.integers(0, 2, (16, 7)).astype(np.float64),
        "squared_error": random.normal(size=(16, 7)),
    }[loss]
    reference = {
        "softmax": torch.nn.CrossEntropyLoss(),
        "sigmoid": torch.nn.BCEWithLogitsLoss(),
        "squared_error": torch.nn.MSELoss(),
    }[loss]
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = reference(theirs, torch.from_numpy(labels))
    expected.backward()
    ours, gradient = jax.value_and_grad(lambda x: example_losses(x, jnp.asarray(labels), loss).mean())(logits)
    assert float(ours) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_large_logits_have_finite_losses(x64):
    logits, labels = jnp.array([[1000.0, -1000.0]]), jnp.array([[0.0, 1.0]])
    assert float(example_losses(logits, labels, "sigmoid")[0]) == 1000


def test_sigmoid_smooths_labels_as_keras_does(x64):
    logits, labels = jnp.array([[0.3, -2.0]]), jnp.array([[0.0, 1.0]])
    smooth = example_losses(logits, jnp.array([[0.05, 0.95]]), "sigmoid")
    np.testing.assert_allclose(example_losses(logits, labels, "sigmoid", 0.1), smooth, rtol=1e-12)


def test_one_class_with_sigmoid_is_one_hot(x64):
    """The loss is timm's BinaryCrossEntropy; the accuracy is that of the largest output."""
    logits = jnp.array([[0.3, -2.0, 1.0], [-1.0, -2.0, -3.0]])
    one_hot = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    labels = jnp.array([2, 1])
    np.testing.assert_allclose(
        example_losses(logits, labels, "sigmoid"), example_losses(logits, one_hot, "sigmoid"), rtol=1e-12
    )
    assert share_right(logits, labels, "sigmoid").tolist() == [True, False]


def test_accuracy_of_several_labels_counts_each_output():
    logits = jnp.array([[0.1, -0.1, 3.0, -2.0], [-1.0, -1.0, -1.0, -1.0]])
    labels = jnp.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert share_right(logits, labels, "sigmoid").tolist() == [0.75, 1.0]


def test_averages_of_a_regression_are_root_mean_squares():
    averages = MetricAverages(["loss"], 3, metric="rmse")
    for step, loss in enumerate((1.0, 9.0)):
        averages.add(step, {"loss": jnp.float32(loss), "finite": jnp.array([True])})
    assert averages.report() == {"loss": 5.0, "rmse": math.sqrt(5.0)}
    assert math.isnan(averages.report()["rmse"])


def test_lower_rmse_and_higher_accuracy_are_better():
    assert evaluation_error({"loss": 4.0, "rmse": 2.0}) == 2
    assert evaluation_error({"loss": 4.0, "accuracy": 0.75}) == 0.25


def test_best_checkpoint_of_a_regression_has_the_lowest_rmse(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step, rmse in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), 1):
        state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, batch_stats={}, tx=optax.identity())
        checkpoints.save(state.replace(step=step), {"loss": rmse**2, "rmse": rmse, "count": 3})
    checkpoints.close()
    assert saved_steps(str(tmp_path)) == [2, 4, 5]


def shapes_data(data_dir, name, feature, labels_of):
    """Write 40 + 13 images with a bright left half, a bright right half, both or neither, and labels of the halves."""
    import tensorflow_datasets as tfds

    random = np.random.default_rng(0)

    def examples(count):
        for _ in range(count):
            halves = random.integers(0, 2, 2)
            pixels = random.integers(0, 40, (32, 32, 3))
            pixels[:, :16] += 180 * halves[0]
            pixels[:, 16:] += 180 * halves[1]
            yield {"image": PIL.Image.fromarray(pixels.astype(np.uint8)), "label": labels_of(halves)}

    features = {"image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"), "label": feature}
    write_tfds(str(data_dir), name, "1.0.0", features, {"train": list(examples(40)), "test": list(examples(13))})


def shapes_config(data_dir, name, loss, num_classes=2, **fields):
    data = DataConfig(name, str(data_dir), flip=False, pad=0, num_threads=0)
    optimizer = OptimizerConfig(learning_rate=0.02, schedule="plateau")
    run = dict(batch_size=8, eval_batch_size=8, num_epochs=2, log_every_steps=5, loss=loss)
    return Config(ModelConfig(11, num_classes=num_classes), data, optimizer, **(run | fields))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    import tensorflow_datasets as tfds

    path = tmp_path_factory.mktemp("several")
    feature = tfds.features.Sequence(tfds.features.ClassLabel(names=["left", "right"]))
    shapes_data(path, "halves", feature, lambda halves: np.flatnonzero(halves).tolist())
    return path


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    import tensorflow_datasets as tfds

    path = tmp_path_factory.mktemp("numbers")
    feature = tfds.features.Tensor(shape=(2,), dtype=np.float32)
    shapes_data(path, "halves", feature, lambda halves: 3.0 * halves.astype(np.float32))
    return path


def evaluated(workdir, split):
    """Return the logits of a run on a split and its labels, computed one image at a time."""
    loaded = load_run(workdir)
    inputs, labels = zip(*(split.image(i) for i in range(len(split))), strict=True)
    images = np.stack([loaded.preprocessing(image) for image in inputs])
    return np.asarray(loaded.model.apply(loaded.variables, images)), np.stack(labels), loaded


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_run_with_several_labels_learns_and_reports_accuracy(several, tmp_path):
    config = shapes_config(several, "halves", "sigmoid")
    assert train_and_evaluate(config, str(tmp_path)) == 0
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    logits, labels, loaded = evaluated(tmp_path, open_splits(config)[1])
    assert loaded.outputs == "sigmoid"
    assert labels.shape == (13, 2)
    assert last["accuracy"] == pytest.approx(((logits > 0) == labels).mean(), abs=1e-6)
    expected = -np.mean(labels * -np.logaddexp(0, -logits) + (1 - labels) * -np.logaddexp(0, logits))
    assert last["loss"] == pytest.approx(expected, rel=1e-4)
    assert last["accuracy"] > 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_regression_reports_rmse_and_keeps_the_best(numbers, tmp_path, capsys):
    config = shapes_config(numbers, "halves", "squared_error", num_epochs=4)
    assert train_and_evaluate(config, str(tmp_path)) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    logits, labels, loaded = evaluated(tmp_path, open_splits(config)[1])
    assert loaded.outputs == "values"
    assert evaluations[-1]["rmse"] == pytest.approx(np.sqrt(np.mean((logits - labels) ** 2)), rel=1e-4)
    assert all("accuracy" not in line for line in lines)
    training = next(line for line in lines if line["kind"] == "train")
    assert training["rmse"] == pytest.approx(math.sqrt(training["loss"]))
    assert "rmse " in capsys.readouterr().out
    best = min(evaluations, key=lambda line: line["rmse"])["step"]
    assert saved_steps(tmp_path / "checkpoints") == sorted({best, *(line["step"] for line in evaluations[-2:])})


def test_loss_must_fit_the_labels(several, numbers, data_dir):
    digits = Config(data=DataConfig("digits", data_dir, mean=(0.3,), std=(0.3,)))
    for config, line in (
        (shapes_config(several, "halves", "softmax"), "config.loss is 'softmax', and the labels of halves/train are "
         "any number of classes; expected sigmoid"),
        (shapes_config(numbers, "halves", "softmax"), "numbers; expected sigmoid, or squared_error for a regression"),
        (shapes_config(several, "halves", "sigmoid", 3), "config.model.num_classes is 3; expected 2, the labels of"),
        (dataclasses.replace(digits, loss="squared_error"), "are one class; expected softmax or sigmoid"),
    ):  # fmt: skip
        with raises_user_error(line):
            check_data(config, *open_splits(config), 1)


def test_one_output_for_one_class_is_refused(data_dir):
    """Each image would have the label 1."""
    config = Config(ModelConfig(num_classes=1), DataConfig("digits", data_dir, mean=(0.3,), std=(0.3,)), loss="sigmoid")
    splits = [dataclasses.replace(split, num_classes=1) for split in open_splits(config)]
    with raises_user_error("digits/train has one class; expected two or more: add the images of another class"):
        check_data(config, *splits, 1)


def test_classes_of_several_labels_cannot_be_selected(several):
    config = shapes_config(several, "halves", "sigmoid")
    config.data.classes = (0,)
    with raises_user_error("halves/train has labels of any number of classes", "unset config.data.classes"):
        open_splits(config)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(loss="hinge"), "config.loss is 'hinge'; expected one of softmax, sigmoid, squared_error"),
        (dict(loss="squared_error", label_smoothing=0.1), "config.label_smoothing is 0.1; expected 0, because"),
        (dict(model=ModelConfig(num_classes=1)), "config.loss is 'softmax'; expected sigmoid or squared_error"),
    ],
)
def test_loss_that_cannot_be_is_refused(fields, line):
    with raises_user_error(line):
        check_config(Config(**fields))


def test_one_output_with_sigmoid_is_accepted():
    check_config(Config(ModelConfig(num_classes=1), loss="sigmoid", label_smoothing=0.1))
