"""A run that is killed and stopped ends as one that is not: python experiments/interruptions.py DATA [--runs-dir DIR]

Trains VGG-11 with batch norm by configs/cifar10_short.py for four epochs on the folder DATA, once without interruption
and once with ten SIGKILL and five SIGTERM at random moments, each followed by the same command. Compares every array of
the last checkpoints and every line of metrics.jsonl except times, and records the resident memory of all processes.
Writes interruptions.json and .md, and draws interruptions.png. Exits with 1 if anything differs. The same command
resumes between the two runs and after an interruption of the second.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import data_fields, parser, train_command, write
from vgg_jax.look import picture
from vgg_jax.training.metric_writer import read_metrics

MEASURED = ("images_per_second", "model_flops_per_second", "mfu")  # in time
INTERVAL = 1.0  # seconds from one sample of the memory to the next
SHOWN = 400  # samples of a run in the result file, at most


class Process:
    """A process of train.py whose memory is sampled until its end."""

    def __init__(self, command: list[str], log: str, run: str, samples: list[dict[str, Any]]) -> None:
        self._log, self._run, self._samples = log, run, samples
        self._before = os.path.getsize(log) if os.path.exists(log) else 0
        with open(log, "a") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self._sampled = 0.0

    def step(self) -> int:
        """Return the last step that this process has reported or resumed from, -1 before the first."""
        with open(self._log, errors="replace") as file:
            file.seek(self._before)
            steps = re.findall(r"(?:train   step |resuming from the checkpoint of step )(\d+)", file.read())
        return int(steps[-1]) if steps else -1

    def wait(self, until: float = np.inf, step: float = np.inf) -> bool:
        """Wait for a moment or a step, and sample the memory meanwhile; return False at the end of the process."""
        while self._process.poll() is None:
            now = time.monotonic()
            if now - self._sampled >= INTERVAL:
                self._sampled = now
                resident = _resident_mib(self._process.pid)
                if resident:
                    self._samples.append({"run": self._run, "process": self._process.pid, "mib": resident})
                if self.step() >= step:
                    return True
            if now >= until:
                return True
            time.sleep(0.02)
        return False

    def end(self, sent: signal.Signals | None = None) -> int:
        """Send a signal, if any, wait for the end, and return the exit code."""
        if sent is not None:
            self._process.send_signal(sent)
        self.wait()
        return self._process.wait()


def _resident_mib(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) // 1024 for line in file if line.startswith("VmRSS")), 0)
    except OSError:
        return 0


def interrupt(options: argparse.Namespace, command: list[str], log: str, steps: int, state: dict[str, Any]) -> None:
    """Take the run to its end through all interruptions that `state` has not yet counted.

    Each waits until the run has reached a random step, then up to `pause` seconds. A step that an earlier process had
    reached before its kill counts, so some signals arrive while the next process starts.
    """
    draws = random.Random(options.seed)
    kinds = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.stops
    draws.shuffle(kinds)
    moments = sorted(draws.uniform(0, 0.95) * steps for _ in kinds)
    pauses = [draws.uniform(0, options.pause) for _ in kinds]
    reached = max([event["step"] for event in state["events"]], default=0)
    for kind, moment, pause in list(zip(kinds, moments, pauses, strict=True))[len(state["events"]) :]:
        process = Process(command, log, "interrupted", state["samples"])
        alive = reached >= moment or process.wait(step=moment)
        alive = alive and process.wait(until=time.monotonic() + pause)
        step = process.step()
        code = process.end(kind)
        if not alive or code == 0:
            raise SystemExit(f"the run ended with exit code {code} before a signal; lower --pause, and see {log}")
        reached = max(reached, step)
        state["events"].append({"signal": kind.name, "step": max(step, 0), "started": step >= 0, "exit_code": code})
        save(options, state)
        print(f"{kind.name} at step {step}: exit code {code}", flush=True)
    code = Process(command, log, "interrupted", state["samples"]).end()
    if code:
        raise SystemExit(f"the last process ended with exit code {code}; see {log}")


def save(options: argparse.Namespace, state: dict[str, Any]) -> None:
    """Keep what has happened so far."""
    with open(os.path.join(options.runs_dir, "state.json.partial"), "w") as file:
        json.dump(state, file)
    os.replace(file.name, os.path.join(options.runs_dir, "state.json"))


def saved_arrays(workdir: str) -> dict[str, np.ndarray]:
    """Return the arrays of the latest checkpoint by name: step, parameters, optimizer, averages."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(os.path.join(os.path.abspath(workdir), "checkpoints")) as manager:
        tree = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def recorded(workdir: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and memory."""
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["kind"] != "memory"]


def compare(whole: str, interrupted: str) -> dict[str, Any]:
    """Return what differs between the ends of two runs."""
    expected, found = saved_arrays(whole), saved_arrays(interrupted)
    same = [name for name in expected if name in found and expected[name].tobytes() == found[name].tobytes()]
    lines = [recorded(workdir) for workdir in (whole, interrupted)]
    different = sorted((expected.keys() | found.keys()) - set(same))
    return {"arrays": len(expected), "different": different, "lines": len(lines[0]), "same_lines": lines[0] == lines[1]}


def memory_of(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each process that lived for a minute the largest memory in the quarters of its time."""
    table = []
    by_process: dict[int, list[int]] = {}
    for sample in samples:
        by_process.setdefault(sample["process"], []).append(sample["mib"])
    for pid, values in by_process.items():
        if len(values) * INTERVAL >= 60:
            quarters = [max(part.tolist()) for part in np.array_split(np.array(values), 4)]
            run = next(sample["run"] for sample in samples if sample["process"] == pid)
            table.append({"run": run, "seconds": round(len(values) * INTERVAL), "quarters": quarters})
    return table


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the memory of both runs over time, with a line at each start of a process."""
    with picture(path, (9, 4)) as figure:
        axes = figure.subplots()
        for run, samples in result["resident_mib"].items():
            axes.plot([s["seconds"] for s in samples], [s["mib"] for s in samples], label=run, linewidth=1)
        axes.set(xlabel="seconds of all processes", ylabel="resident memory, MiB", ylim=(0, None))
        axes.set_title("Memory of the run without and with interruptions")
        axes.grid()
        axes.legend()


def thinned(samples: list[dict[str, Any]], run: str) -> list[dict[str, float]]:
    """Return at most SHOWN samples of a run, each the largest of its neighbors, with its time."""
    values = np.array([sample["mib"] for sample in samples if sample["run"] == run])
    parts = np.array_split(values, min(SHOWN, len(values)))
    ends = np.cumsum([len(part) for part in parts]) * INTERVAL
    return [{"seconds": float(end), "mib": int(part.max())} for end, part in zip(ends, parts, strict=True)]


def report(options: argparse.Namespace, state: dict[str, Any], compared: dict[str, Any]) -> None:
    """Write the result files and the picture."""
    memory = memory_of(state["samples"])
    resident = {run: thinned(state["samples"], run) for run in ("whole", "interrupted")}
    settings = {name: getattr(options, name) for name in ("epochs", "images", "kills", "stops", "seed")}
    equal = not compared["different"] and compared["same_lines"]
    lines = [
        "# A run that is killed and stopped",
        "",
        f"VGG-11 with batch norm, `configs/cifar10_short.py`, {options.epochs:g} epochs of {options.images:,} images;",
        f"{options.kills} SIGKILL and {options.stops} SIGTERM at random moments, drawn by seed {options.seed}.",
        "",
        f"The ends of both runs are {'equal' if equal else 'DIFFERENT'}: {compared['arrays']} arrays of the last "
        f"checkpoint ({len(compared['different'])} differ)",
        f"and {compared['lines']} lines of `metrics.jsonl` ({'equal' if compared['same_lines'] else 'different'}).",
        *("", "| signal | last reported step | exit code |", "|---|---|---|"),
        *(
            f"| {e['signal']} | {e['step'] if e['started'] else 'before the first'} | {e['exit_code']} |"
            for e in state["events"]
        ),
        *("", "Largest resident memory in MiB, in the quarters of the time of each process of a minute or more:"),
        *("", "| run | seconds | first | second | third | fourth |", "|---|---|---|---|---|---|"),
        *(f"| {row['run']} | {row['seconds']} | " + " | ".join(map(str, row["quarters"])) + " |" for row in memory),
        *("", "![Resident memory over time](interruptions.png)"),
    ]
    result = {**settings, **compared, "events": state["events"], "memory": memory, "resident_mib": resident}
    write(options.out, "interruptions", result, lines)
    draw(os.path.join(options.out, "interruptions.png"), result)


def main() -> None:
    """Train twice, compare, and write the results."""
    options = parser(__doc__ or "", "interruptions")
    options.add_argument("--kills", type=int, default=10, help="(default: %(default)s)")
    options.add_argument("--stops", type=int, default=5, help="(default: %(default)s)")
    options.add_argument("--epochs", type=float, default=4, help="(default: %(default)s)")
    options.add_argument("--images", type=int, default=45_000, help="training images (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    options.add_argument("--pause", type=float, default=10, help="longest pause before a signal (default: %(default)s)")
    options.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    chosen = options.parse_args()
    os.makedirs(chosen.runs_dir, exist_ok=True)
    fields = [
        *("model.depth=11", f"num_epochs={chosen.epochs}", f"optimizer.warmup_epochs={chosen.epochs / 5}"),
        *(f"log_every_steps={chosen.log_every}", "checkpoint_every_epochs=0.25"),
        *data_fields(chosen.data, f"train[:{chosen.images}]", "train[45000:]"),
    ]
    workdirs = {run: os.path.join(chosen.runs_dir, run) for run in ("whole", "interrupted")}
    command = {run: train_command("cifar10_short.py", workdir, fields) for run, workdir in workdirs.items()}
    path = os.path.join(chosen.runs_dir, "state.json")
    state: dict[str, Any] = {"fields": fields, "events": [], "samples": [], "whole": False}
    if os.path.exists(path):
        with open(path) as file:
            state = json.load(file)
    if state["fields"] != fields:
        raise SystemExit(f"{path} is of other options; expected the same: choose another --runs-dir")
    if not state["whole"]:
        shutil.rmtree(workdirs["whole"], ignore_errors=True)  # a resumed run would not be one without interruption
        process = Process(command["whole"], workdirs["whole"] + ".log", "whole", state["samples"])
        if code := process.end():
            raise SystemExit(f"the run without interruption ended with exit code {code}; see {workdirs['whole']}.log")
        state["whole"] = True
        save(chosen, state)
    steps = read_metrics(os.path.join(workdirs["whole"], "metrics.jsonl"))[-1]["step"]
    log = workdirs["interrupted"] + ".log"
    interrupt(chosen, command["interrupted"], log, steps, state)
    compared = compare(workdirs["whole"], workdirs["interrupted"])
    report(chosen, state, compared)
    print(f"{compared['arrays']} arrays, different: {compared['different'] or 'none'}; see interruptions.md")
    sys.exit(bool(compared["different"]) or not compared["same_lines"])


if __name__ == "__main__":
    main()
