"""Accuracy of every network on the digits: python experiments/learning.py [--runs-dir DIR] [--only D D-BN ...]

Trains each column of the paper on the embedded digits with configs/digits_plain.py, and columns A, B, D and E with
batch norm with configs/digits.py. Runs `train.py` for one network after the other, and prints a table of accuracies and
times. A complete run in the directory of runs is not repeated. Takes about an hour on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS = {
    "A": ["--config.model.depth=11"],
    "A-LRN": ["--config.model.depth=11", "--config.model.lrn"],
    "B": ["--config.model.depth=13"],
    "C": ["--config.model.depth=16", "--config.model.conv1x1"],
    "D": ["--config.model.depth=16"],
    "E": ["--config.model.depth=19"],
}
# Name, configuration, column and seed of each run.
RUNS = [(column, "digits_plain", column, 0) for column in COLUMNS]
RUNS += [(f"{column}-BN", "digits", column, 0) for column in "ABDE"]
RUNS += [(f"D{bn}", config, "D", seed) for bn, config in (("", "digits_plain"), ("-BN", "digits")) for seed in (1, 2)]


def run(name: str, config: str, column: str, seed: int, runs_dir: str) -> dict[str, float]:
    """Train one network; return its accuracy on the 360 held-out digits, its seconds and its images/s."""
    workdir = os.path.join(runs_dir, f"{name}-seed{seed}")
    timing = os.path.join(workdir, "seconds.txt")
    if not os.path.exists(timing):
        command = [
            sys.executable,
            os.path.join(ROOT, "train.py"),
            "--config",
            os.path.join(ROOT, f"configs/{config}.py"),
        ]
        command += [*COLUMNS[column], f"--config.seed={seed}", "--workdir", workdir]
        start = time.perf_counter()
        with open(workdir + ".log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        with open(timing, "w") as file:
            file.write(str(time.perf_counter() - start))
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    rates = sorted(line["images_per_second"] for line in lines if line["kind"] == "train")
    with open(timing) as file:
        seconds = float(file.read())
    accuracy = [line["accuracy"] for line in lines if line["kind"] == "eval"][-1]
    return {"accuracy": accuracy, "seconds": seconds, "images_per_second": rates[len(rates) // 2]}


def main() -> None:
    """Train the missing networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default=os.path.join(ROOT, "runs", "learning"))
    parser.add_argument("--only", nargs="*", help="names of the networks to train, such as D and D-BN")
    arguments = parser.parse_args()
    os.makedirs(arguments.runs_dir, exist_ok=True)
    print("| network | seed | accuracy | seconds | images/s in training |\n|---|---|---|---|---|", flush=True)
    for name, config, column, seed in RUNS:
        if not arguments.only or name in arguments.only:
            result = run(name, config, column, seed, arguments.runs_dir)
            print(
                "| {} | {} | {accuracy:.2%} | {seconds:.0f} | {images_per_second:.0f} |".format(name, seed, **result),
                flush=True,
            )


if __name__ == "__main__":
    main()
