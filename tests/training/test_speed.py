"""The operations of a training step, the peaks of devices, and the figures of a report."""

import jax
import pytest

from vgg_jax import VGG
from vgg_jax.training.metric_writer import MetricWriter, read_metrics
from vgg_jax.training.speed import multiply_adds, peak_flops, training_flops

SIZE = 32
MODEL = VGG(11, num_classes=10, pool_size=1, hidden=(64,))


def test_multiply_adds_are_those_of_the_table():
    counts = multiply_adds(MODEL, SIZE)
    assert list(counts) == [f"conv{s}_{i}" for s in (1, 2, 3, 4, 5) for i in range(1, 1 + (s > 2) + 1)] + ["fc6", "fc8"]
    assert counts["conv1_1"] == 32 * 32 * 9 * 3 * 64
    assert counts["conv3_2"] == 8 * 8 * 9 * 256 * 256
    assert (counts["fc6"], counts["fc8"]) == (512 * 64, 64 * 10)


def test_training_takes_three_times_the_forward_work():
    """Only the gradient of the images is not needed."""
    counts = multiply_adds(MODEL, SIZE)
    assert training_flops(MODEL, SIZE) == 2 * (3 * sum(counts.values()) - counts["conv1_1"])


def test_frozen_layers_have_less_work():
    counts = multiply_adds(MODEL, SIZE)
    features = tuple(layer for layer in counts if layer.startswith("conv"))
    expected = 2 * (sum(counts.values()) + counts["fc6"] + 2 * counts["fc8"])
    assert training_flops(MODEL, SIZE, frozen=features) == expected
    inner = 2 * (3 * sum(counts.values()) - counts["conv1_1"] - counts["conv3_1"])
    assert training_flops(MODEL, SIZE, frozen=("conv3_1",)) == inner


def test_work_agrees_with_the_compiler():
    """XLA counts no multiplication with zeros of the border, but additions of biases and rectifiers."""
    variables = jax.eval_shape(MODEL.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    cost = jax.jit(MODEL.apply).trace(variables, images).lower(lowering_platforms=("cuda",)).cost_analysis()
    assert 2 * sum(multiply_adds(MODEL, 224).values()) == pytest.approx(cost["flops"], rel=0.05)


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA L40S", 0),
        ("NVIDIA H100 PCIe", 0),
        ("NVIDIA GeForce RTX 4090 D", 0),
        ("cpu", 0),
    ],
)
def test_published_peaks_are_found_by_device(device_kind, tflops):
    assert peak_flops(device_kind, "bfloat16") == tflops * 1e12
    assert peak_flops(device_kind, "float32") == 0
    assert peak_flops(device_kind, "float32", 67.0) == peak_flops(device_kind, "bfloat16", 67.0) == 67e12


def test_report_gives_model_flops_and_mfu(tmp_path, capsys):
    for name, peak in (("unknown", 0.0), ("known", 1e15)):
        (tmp_path / name).mkdir()
        writer = MetricWriter(str(tmp_path / name), 0, 8, 4, flops_per_image=10**12, peak=peak)
        writer.train(4, 32, {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1})
        writer.close()
    without, with_peak = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("unknown", "known"))
    assert without["model_flops_per_second"] == pytest.approx(1e12 * without["images_per_second"])
    assert "mfu" not in without
    assert with_peak["mfu"] == pytest.approx(with_peak["model_flops_per_second"] / 1e15)
    line = capsys.readouterr().out.splitlines()[-1]
    assert " TFLOP/s  mfu " in line
