"""A network that has not begun to learn is told apart from one that learns."""

import dataclasses
import math

import pytest

from tests.training.test_progress import config, small_networks, train  # noqa: F401 - fixtures
from vgg_jax.config import Config, ModelConfig
from vgg_jax.training.chance import diagnosis, is_chance


@pytest.mark.parametrize(
    ("loss", "accuracy", "count", "num_classes", "expected"),
    [
        pytest.param(2.302, 0.1, 10_000, 10, True, id="chance"),
        pytest.param(2.31, 0.093, 10_000, 10, True, id="within_noise"),
        pytest.param(2.302, 0.12, 10_000, 10, False, id="accuracy"),
        pytest.param(2.302, 0.12, 360, 10, True, id="accuracy_of_few"),
        pytest.param(2.25, 0.1, 10_000, 10, False, id="loss_falls"),
        pytest.param(2.4, 0.1, 10_000, 10, False, id="loss_rises"),
        pytest.param(6.9, 0.001, 50_000, 1000, True, id="imagenet"),
        pytest.param(math.nan, 0.1, 10_000, 10, False, id="nan"),
        pytest.param(0.0, 1.0, 100, 1, False, id="one_class"),
    ],
)
def test_chance_is_a_loss_and_an_accuracy_of_guessing(loss, accuracy, count, num_classes, expected):
    assert is_chance(loss, accuracy, count, num_classes) == expected


def test_remedies_fit_the_configuration():
    plain = diagnosis(Config(ModelConfig(num_classes=10, batch_norm=False)), math.log(10), 0.1, 100)
    assert "at chance: training loss 2.303 is ln(10), accuracy 10.0% is 1/10" in plain
    remedies = (
        "config.model.batch_norm=True or config.init_from of a shallower trained network or a lower or higher "
        "config.optimizer.learning_rate than 0.1 or config.optimizer.warmup_epochs"
    )
    assert plain.endswith(remedies)
    assert "batch_norm" not in diagnosis(Config(ModelConfig(num_classes=10)), math.log(10), 0.1, 100)
    assert diagnosis(Config(ModelConfig(num_classes=10)), math.log(20), 0.1, 100) == ""


@pytest.mark.slow
def test_deep_plain_network_at_chance_is_diagnosed_once(config, tmp_path, capsys):  # noqa: F811 - the fixture
    """The second epoch does not repeat the line. A network that learns: tests/cli/test_train.py."""
    model = ModelConfig(depth=19, batch_norm=False, pool_after=(1, 2, 3, 4))
    data = dataclasses.replace(config.data, classes=(), images_per_class=30)
    train(dataclasses.replace(config, model=model, data=data, freeze=()), tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "at chance" in line]
    assert line.startswith("at chance: training loss 2.3")
    assert "is ln(10), accuracy" in line
