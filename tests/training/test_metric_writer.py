"""The files and log lines of a run."""

import json

import pytest

from tests.conftest import raises_user_error
from vgg_jax.training.metric_writer import MetricWriter, draw_curves, read_metrics


def report(workdir, start, stop):
    writer = MetricWriter(str(workdir), start, num_steps=8, steps_per_epoch=4)
    for step in range(start + 1, stop + 1):
        writer.train(step, 32, {"loss": 1 / step, "accuracy": step / 10, "learning_rate": 0.1})
        if step % 4 == 0:
            writer.evaluation(step, {"loss": 2 / step, "accuracy": step / 10, "count": 10})
    writer.close()


def test_log_lines_metrics_and_curves_are_written(tmp_path, capsys):
    report(tmp_path, 0, 8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    for part in ("train", "step 3/8", "epoch 0.75", "loss 0.3333", "accuracy 30.00%", "images_per_second", "ETA 0"):
        assert part in lines[2]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in metrics[-2:]] == [("train", 8), ("eval", 8)]
    assert metrics[-1]["epoch"] == 2.0
    assert metrics[-1]["count"] == 10
    png = (tmp_path / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_resumed_run_repeats_no_line_and_drops_a_partial_one(tmp_path):
    report(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    report(tmp_path, 4, 8)  # the last checkpoint is that of step 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8]


@pytest.mark.parametrize("lines", ["", '{"kind": "train", "step": 1, "epoch": 0.1, "loss": 1.0, "accuracy": 0.5}\n'])
def test_curves_of_a_run_with_at_most_one_line(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    draw_curves(str(tmp_path))
    assert (tmp_path / "curves.png").exists()


def test_nonfinite_metrics_are_null_in_json(tmp_path):
    writer = MetricWriter(str(tmp_path), 0, num_steps=8, steps_per_epoch=4)
    writer.train(1, 32, {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1})
    writer.train(2, 32, {"loss": float("nan"), "accuracy": float("nan"), "learning_rate": 0.1, "skipped": 1})
    writer.evaluation(4, {"loss": float("inf"), "accuracy": 0.1, "count": 10})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line["loss"] for line in read_metrics(str(tmp_path / "metrics.jsonl"))] == [1.0, None, None]


def test_full_disk_gives_one_line(tmp_path):
    """The device /dev/full stands for the disk."""
    writer = MetricWriter(str(tmp_path), 0, num_steps=8, steps_per_epoch=4)
    lines = writer.trackers[0]
    lines.file.close()
    lines.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closed below
    with raises_user_error("cannot write ", "metrics.jsonl: No space left on device", "rerun the same command"):
        writer.train(1, 32, {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1})
    with raises_user_error("cannot write "):
        writer.release()
    writer.release()
