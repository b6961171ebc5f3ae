"""Early stopping: a sequence worked out by hand, and a run that ends early and stays finished."""

import json
import math

import pytest

from vgg_jax.config import Config
from vgg_jax.training.early_stopping import EarlyStopping


def updated(stopping, values, first=1):
    """Return the waited evaluations and whether the run is over after each value."""
    found = []
    for step, value in enumerate(values, first):
        stopping.update(step, {stopping.metric: value})
        found.append((stopping.waited, stopping.is_over))
    return found


def test_sequence_worked_out_by_hand():
    """Patience 2, gains above 0.015 count: 0.60 to 0.61 is no gain, 0.62 is one against 0.60."""
    stopping = EarlyStopping(2, 0.015, "accuracy")
    accuracies = [0.50, 0.60, 0.61, 0.62, 0.62, math.nan]
    assert updated(stopping, accuracies) == [
        *((0, False), (0, False), (1, False), (0, False), (1, False), (2, True)),
    ]
    assert (stopping.best, stopping.best_step) == (0.62, 4)
    assert stopping.line() == "stopped early: best accuracy 0.6200, at step 4, 2 evaluations ago"


def test_smaller_rmse_is_better():
    stopping = EarlyStopping(1, 0.0, "rmse")
    assert updated(stopping, [2.0, 1.5, 1.5]) == [(0, False), (0, False), (1, True)]


def test_without_patience_the_run_never_ends_early():
    assert updated(EarlyStopping(0, 0.0, "accuracy"), [0.5] * 9)[-1] == (8, False)


def test_saved_state_continues_the_count():
    """A resumed run ends at the same evaluation as one that was never stopped, wherever it was stopped."""
    config = Config(early_stopping_patience=3)
    accuracies = [0.5, 0.4, 0.6, 0.6, 0.5, 0.3]
    expected = updated(EarlyStopping.of_run(config, {}), accuracies)
    for stop in range(len(accuracies)):
        before = EarlyStopping.of_run(config, {})
        updated(before, accuracies[:stop])
        saved = json.loads(json.dumps(before.state()))
        after = EarlyStopping.of_run(config, saved)
        assert updated(after, accuracies[stop:], stop + 1) == expected[stop:]
        assert (after.best, after.best_step) == (0.6, 3)


@pytest.mark.parametrize("saved", [{}, {"skipped": 0}])
def test_checkpoints_of_older_versions_start_the_count(saved):
    assert EarlyStopping.of_run(Config(), saved).waited == 0
