"""What a user sees: a real run on a pseudo-terminal of 80 columns, and no other library's warning in any command."""

import fcntl
import json
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import PIL.Image
import pytest

from vgg_jax.console import Bar, duration, progress_line
from vgg_jax.training.terminal import _facts

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ("data.image_size=16", "data.pad=2", "model.pool_after=(1, 2, 3, 4)", "num_epochs=2", "batch_size=32")
# The command vgg-jax with networks an eighth as wide. Like the command, it sets the variable before JAX is imported.
COMMAND = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from tests.narrow import NARROW_TABLE
from vgg_jax.__main__ import main
from vgg_jax.model import TABLE_1
TABLE_1.update(NARROW_TABLE)
sys.exit(main())
"""


def on_terminal(command, columns):
    """Run a command on a terminal of this width; return its exit code and output."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=side, stdout=side, stderr=side)
    os.close(side)
    output = b""
    while True:
        try:
            part = os.read(terminal, 2**16)
        except OSError:  # how Linux ends the output
            break
        if not part:
            break
        output += part
    os.close(terminal)
    return process.wait(), output.decode()


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """Return the directory of a run on a terminal, and what the terminal received."""
    workdir = tmp_path_factory.mktemp("terminal") / "run"
    fields = [f"--config.{field}" for field in (*SMALL, f"data.data_dir={data_dir}")]
    code, output = on_terminal(
        [sys.executable, "-c", COMMAND, "train", "--config", "digits", "--workdir", str(workdir), *fields], 80
    )
    assert code == 0, output
    return workdir, output


def test_bar_moves_fits_80_columns_and_names_the_split(run):
    shown = [line.strip() for line in re.split("[\r\n]+", run[1]) if line.strip()]
    bars = [line for line in shown if re.match(r"(train|eval) epoch", line)]
    assert max(map(len, bars)) < 80
    counts = [int(m.group(1)) for line in bars if (m := re.search(r"train epoch 1/2 .* (\d+)/44\b", line))]
    assert len(set(counts)) > 3
    assert min(counts) < 11  # before the first report
    assert max(counts) == 44
    complete = r"train epoch 2/2  \[#* *\]  \d+/44  loss .*  acc .*%  .* img/s  ETA \d\d:\d\d$"
    assert any(re.match(complete, bar) for bar in bars)
    assert any(re.match(r"eval epoch 2/2  \[#* *\]  \d/1 batches", bar) for bar in bars)


def test_terminal_names_each_phase(run):
    for phase in ("reading digits/train", "initializing the network", "compiling the steps of training"):
        assert phase in run[1]


def test_each_epoch_leaves_a_line(run):
    workdir, output = run
    lines = [line.rstrip("\r").split("\r")[-1].strip() for line in output.split("\n")]
    reported = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for epoch in (1, 2):
        (train,) = [line for line in lines if re.match(rf"train epoch {epoch}/2  loss", line)]
        assert re.search(r"acc .*%  [\d,]+ img/s  ETA \d\d:\d\d$", train)
        losses = [r["loss"] for r in reported if r["kind"] == "train" and epoch - 1 < r["epoch"] <= epoch]
        assert len(losses) == 4
        shown = float(re.search(r"loss (\S+)", train).group(1))
        assert shown == pytest.approx(np.mean(losses), abs=0.0051)
        (evaluation,) = [line for line in lines if line.startswith(f"eval  epoch {epoch}/2  loss")]
        accuracy = [r["accuracy"] for r in reported if r["kind"] == "eval" and r["epoch"] == epoch]
        assert f"acc {accuracy[0]:.1%}" in evaluation


def test_lines_fit_narrow_and_wide_terminals():
    facts = ["4999/5004", "loss 1.23", "acc 75.1%", "1,234 img/s", "ETA 12:34:56"]
    assert progress_line("train epoch 90/100", facts, 0.5, 80).endswith(facts[-1])
    for columns in range(10, 200):
        assert len(progress_line("reading /a/long/path/to/a/folder/of/photographs", facts, 0.5, columns)) < columns
    wide = progress_line("train epoch 1/2", facts, 0.5, 120)
    assert "[######      ]" in wide
    assert wide.endswith("ETA 12:34:56")
    assert duration(3723) == "1:02:03"


def test_other_metrics_have_a_place_on_the_bar():
    metrics = {"loss": 0.5, "rmse": 12.5, "learning_rate": 0.1, "skipped": 3, "images_per_second": 1234.5}
    assert _facts(metrics) == ["loss 0.500", "rmse 12.50", "skipped 3", "1,234 img/s"]


def test_bar_is_silent_off_a_terminal(capsys):
    with Bar("work", 3, "items") as bar:
        bar.update()
        assert not bar.visible
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_commands_print_no_warning_of_a_library(run, data_dir, tmp_path):
    """A run that resumes, then each command: standard error is empty but for notes, also for torch's files."""
    workdir = str(run[0])
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    fields = [f"--config.{field}" for field in (*SMALL[:3], SMALL[4], f"data.data_dir={data_dir}", "num_epochs=3")]
    resumed = ("train", "--config", "digits", "--workdir", workdir, *fields)
    weights, pictures = str(tmp_path / "net.safetensors"), [str(tmp_path / f"{name}.png") for name in "abc"]
    commands = {
        resumed: "finished: step 132",
        ("evaluate", "--workdir", workdir, "--output", str(tmp_path)): "center_crop",
        ("convert", workdir, weights): "VGG-11 with batch norm",
        ("convert", workdir, str(tmp_path / "net.pth")): "VGG-11 with batch norm",
        ("predict", "--weights", weights, str(tmp_path / "a.png")): "%",
        ("prepare", "digits", "--data-dir", str(tmp_path / "tfds")): "digits is in",
        ("statistics", "digits", "--data-dir", data_dir, "--images", "10"): "--config.data.mean=",
        ("style-transfer", *pictures, "--weights", weights, "--steps=2", "--size=32"): "c.png",
    }
    env = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    for arguments, answer in commands.items():
        process = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert answer in process.stdout
        assert [line for line in process.stderr.splitlines() if not line.startswith("note: ")] == []
        assert "WARNING" not in process.stdout


def test_skipped_steps_print_no_warning_of_a_library(tmp_path):
    """tensorboardX warns of each NaN."""
    code = f"""
from vgg_jax.runtime import configure
from vgg_jax.training.metric_writer import MetricWriter
import warnings
configure()
writer = MetricWriter({str(tmp_path)!r}, 0, 8, 4)
writer.train(1, 32, {{"loss": float("nan"), "accuracy": 0.5}})
writer.close()
warnings.warn("of a library")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stderr == ""
    assert "loss nan" in process.stdout
