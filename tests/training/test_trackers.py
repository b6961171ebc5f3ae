"""Trackers: a user's own one receives each report of a run, and its resumption."""

import dataclasses

import numpy as np
import pytest

from tests.conftest import raises_user_error
from vgg_jax.config import Config, DataConfig, ModelConfig
from vgg_jax.training.loop import train_and_evaluate
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.trackers import Tracker


class Memory:
    """A tracker as a user writes it."""

    def __init__(self):
        self.starts, self.reports, self.closed = [], [], 0

    def start(self, config, step):
        self.starts.append((config["optimizer.learning_rate"], step))

    def record(self, kind, step, epoch, metrics):
        self.reports.append((kind, step, epoch, dict(metrics)))

    def close(self):
        self.closed += 1


@pytest.fixture
def config(data_dir, narrow):
    data = DataConfig(dataset="digits", data_dir=data_dir, images_per_class=8, mean=(0.3,), std=(0.4,), flip=False)
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4)),
        data=data,
        batch_size=40,
        eval_batch_size=360,
        num_epochs=3,
        per_class_accuracy=True,
        log_every_steps=1,
    )


@pytest.mark.slow
def test_tracker_receives_what_the_files_hold(config, tmp_path, capsys):
    tracker = Memory()
    assert isinstance(tracker, Tracker)
    config.num_epochs = 2
    assert train_and_evaluate(config, str(tmp_path), trackers=[tracker]) == 0
    config.num_epochs = 3
    assert train_and_evaluate(config, str(tmp_path), trackers=[tracker]) == 0
    assert tracker.starts == [(0.1, 0), (0.1, 4)]
    assert tracker.closed >= 2
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [report[:2] for report in tracker.reports]
    (classes, *_) = [line for line in lines if line["kind"] == "classes"]
    assert [name for name in classes if name.startswith("accuracy/")] == [f"accuracy/{i}" for i in range(10)]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    accuracies = np.array([classes[f"accuracy/{i}"] for i in range(10)])
    assert evaluations[0]["accuracy"] == pytest.approx(accuracies.mean(), abs=0.02)  # nearly equal classes
    assert "lowest accuracy: " in capsys.readouterr().out


@pytest.mark.slow
def test_run_that_stops_early_stays_finished(config, tmp_path, capsys):
    config.num_epochs, config.early_stopping_patience, config.early_stopping_min_delta = 9, 2, 1.0
    assert train_and_evaluate(config, str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "stopped early: best accuracy" in output and "finished: step 6" in output
    assert train_and_evaluate(config, str(tmp_path)) == 0
    assert "is finished: stopped early" in capsys.readouterr().out
    longer = dataclasses.replace(config, early_stopping_patience=3)
    assert train_and_evaluate(longer, str(tmp_path)) == 0
    assert "finished: step 8" in capsys.readouterr().out


@pytest.mark.slow
def test_best_checkpoint_initializes_another_run(config, tmp_path, capsys):
    assert train_and_evaluate(config, str(tmp_path / "first")) == 0
    config.init_from, config.init_layers, config.num_epochs = str(tmp_path / "first"), ("features",), 1
    for step in ("best", "4"):
        config.init_step = step
        assert train_and_evaluate(config, str(tmp_path / step)) == 0
    config.init_step = "5"
    with raises_user_error("has no checkpoint of step 5; expected "):
        train_and_evaluate(config, str(tmp_path / "other"))
