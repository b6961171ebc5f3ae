"""The driver of the throughput comparison: as a command on a tiny cell, and with simulated arms."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import throughput
from benchmarks.throughput_cells import flops, parse_cell
from vgg_jax import VGG
from vgg_jax.training.speed import multiply_adds

ROOT = pathlib.Path(__file__).parents[2]
CIFAR = dict(num_classes=10, pool_size=1, hidden=())


@pytest.mark.parametrize(
    "fields, size, billions",
    [
        (dict(depth=11), 224, 7.609),
        (dict(depth=13), 224, 11.308),
        (dict(depth=16, conv1x1=True), 224, 11.771),
        (dict(depth=16), 224, 15.470),
        (dict(depth=19), 224, 19.632),
        (dict(depth=16, batch_norm=True, **CIFAR), 32, 0.3132),
    ],
)
def test_work_equals_the_published_figures(fields, size, billions):
    assert sum(multiply_adds(VGG(**fields), size).values()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_training_work_omits_the_gradient_of_the_images():
    first = 224 * 224 * 9 * 3 * 64
    infer, train = (flops(parse_cell(f"vgg16-224-{mode}", 8)) for mode in ("infer", "train"))
    assert train == 3 * infer - 2 * first


def test_cells_have_names():
    cell = parse_cell("vgg16_bn-32-epoch-bf16", 512)
    assert (cell.depth, cell.batch_norm, cell.size, cell.mode) == (16, True, 32, "epoch")
    assert (cell.dtype, cell.cifar_head, cell.batch) == ("bfloat16", True, 512)
    for group in throughput.CELLS.values():
        assert [parse_cell(name, 1).name for name in (*group[0], *group[1])] == [*group[0], *group[1]]
    for name in ("vgg12-32-train", "vgg16-64-train", "vgg16-224-epoch", "vgg16-32"):
        with pytest.raises(ValueError, match="expected one such as"):
            parse_cell(name, 1)


def check_table(output, figures):
    """Check that every arm has a row and that its ratio is that of the medians."""
    (result,) = figures["cells"]
    lines = [line for line in output.splitlines() if line.startswith(f"| {result['cell']['name']}")]
    assert len(lines) == len(result["arms"])
    ours = result["arms"]["ours"]["images_per_second"]
    for line, (name, arm) in zip(lines, result["arms"].items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == name
        if "rounds" in arm:
            assert arm["images_per_second"] == pytest.approx(np.median(arm["rounds"]))
            assert float(cells[2].replace(",", "")) == pytest.approx(arm["images_per_second"], rel=1e-3)
            assert float(cells[3].split()[0]) == pytest.approx(ours / arm["images_per_second"], abs=0.006)
            work = result["flops_per_image"] * arm["images_per_second"]
            assert arm["share_of_product"] == pytest.approx(work / result["ceiling_flops"])
        else:
            assert cells[2] == f"not timed: {arm['error']}"
    return result["arms"]


@pytest.mark.slow
def test_command_on_a_tiny_cell(torchvision, tmp_path):
    """Runs real processes; the arms agree before they are timed."""
    command = [sys.executable, "benchmarks/throughput.py", "--cells", "vgg11-32-train", "--batch-size", "2"]
    command += ["--arms", "ours", "plain", "torch_eager", "--rounds", "1", "--seconds", "0.1", "--product-size", "128"]
    command += ["--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    arms = check_table(done.stdout, figures)
    assert list(arms) == ["torch_eager", "ours", "plain"]
    for arm in arms.values():
        assert arm["disagreement"]["logits"] < 1e-4
        assert arm["disagreement"]["loss 1"] < 1e-3 and arm["disagreement"]["loss 2"] < 1e-3
        assert arm["losses"][0] != arm["losses"][1]
        assert (
            arm["first_answer_seconds"] > arm["compile_seconds"] >= 0
            and arm["peak_bytes"] > 0
            and len(arm["rounds"]) == 1
        )
    assert arms["torch_eager"]["disagreement"]["logits"] == 0 < arms["ours"]["disagreement"]["logits"]
    for part in (f"torch {figures['versions']['torch']}", f"{figures['cores']} cores", "flags", "load before"):
        assert part in done.stdout


class SimulatedProcess:
    """Arms of known speed: the images/s of the first round, and half as many in the second."""

    speeds = {"torch_eager": 100.0, "ours": 200.0, "plain": 50.0, "keras": 10.0}
    calls: list = []

    def __init__(self, name, log, environment):
        self.name, self.bursts = name, 0

    def ask(self, command, **arguments):
        self.calls.append((command, self.name))
        match command:
            case "prepare":
                if self.name == "torch_compile":
                    raise RuntimeError("found no compiler")
                logits = np.ones((2, 10)) * (1.01 if self.name == "keras" else 1)
                np.save(pathlib.Path(arguments["directory"]) / f"{self.name}.npy", logits)
                losses = [2.0, math.nan if self.name == "plain" else 1.9]
                return dict(
                    losses=losses, first_answer_seconds=2.0, compile_seconds=1.0, step_seconds=0.1, base_bytes=2**20
                )
            case "time":
                self.bursts += 1
                return {"seconds": arguments["steps"] * 2 * self.bursts / self.speeds[self.name]}
            case "matrix_product":
                return {"flops": 1e12 if self.name == "ours" else 2e12}
        return dict(peak_bytes=3 * 2**20, device_peak_bytes=0)

    def processor_seconds(self):
        return 0.0

    def close(self):
        self.calls.append(("close", self.name))


def test_disagreeing_or_failing_arms_are_not_timed(monkeypatch, capsys, tmp_path):
    """The other arms are timed in turn; each round begins with another arm."""
    monkeypatch.setattr(throughput, "Process", SimulatedProcess)
    monkeypatch.setattr(throughput, "write_inputs", lambda cell, directory: None)
    monkeypatch.setattr(throughput, "find_platform", lambda: ("cpu", "cpu"))
    monkeypatch.setattr(SimulatedProcess, "calls", [])
    names = ["torch_eager", "torch_compile", "ours", "plain", "keras"]
    arguments = ["--cells", "vgg11-32-train", "--batch-size", "2", "--rounds", "2", "--json", str(tmp_path / "json")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments, "--arms", *names])
    assert throughput.main() == 1
    arms = check_table(capsys.readouterr().out, json.loads((tmp_path / "json").read_text()))
    assert arms["torch_compile"]["error"] == "found no compiler"
    assert arms["keras"]["error"].startswith("disagrees with torch_eager: logits 1.0e-02")
    assert arms["plain"]["error"].startswith("disagrees with torch_eager")
    timed = [name for command, name in SimulatedProcess.calls if command == "time"]
    assert timed == ["torch_eager", "ours", "ours", "torch_eager"]
    assert arms["ours"]["rounds"] == [200, 100] and arms["ours"]["ours_over_it_rounds"] == [1, 1]
    assert arms["torch_eager"]["ours_over_it"] == pytest.approx(2)
    closed = sorted(name for command, name in SimulatedProcess.calls if command == "close")
    assert closed == sorted(names)


def test_arms_import_without_the_other_packages():
    """Machines with an accelerator may lack TFDS, Grain and ml_collections."""
    absent = (
        "tensorflow_datasets grain ml_collections array_record tensorflow tensorboardX simplejpeg cykooz keras torch"
    )
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent.split()!r}))\n"
        "import benchmarks.throughput, benchmarks.throughput_jax\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inputs_fit_the_network(tmp_path):
    """Names and shapes are torchvision's, and no array is constant."""
    throughput.write_inputs(parse_cell("vgg11_bn-32-train", 2), str(tmp_path))
    with np.load(tmp_path / "weights.npz") as weights:
        assert weights["features.0.weight"].shape == (64, 3, 3, 3)
        assert weights["classifier.0.weight"].shape == (10, 512)
        assert all(array.dtype == np.float32 and array.std() > 0 for array in weights.values())
        assert weights["features.1.running_var"].min() > 0.5
    with np.load(tmp_path / "inputs.npz") as inputs:
        assert inputs["images"].shape == (2, 32, 32, 3)
