"""The seconds from the start of a process to its first answer, and where they go.

    python benchmarks/first_answer.py [--rounds N] [--weights FILE] [--image FILE] [--no-train]

Runs `vgg-jax predict` on one image with an empty compilation cache and then with the filled one, and prints the seconds
of the whole process, its processor seconds, its peak memory beyond imports, and a table: imports, reading the weights,
tracing and lowering, compiling or loading the program. A thread traces and compiles while the weights are read, so that
these overlap. Then runs `train.py --config configs/digits.py` until its first step in the same two ways.

By default the network is VGG-16 with constant weights, and the image is noise.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.command import seconds_to_first_step  # noqa: E402 - after the path

MAKE = """
import sys
import jax, jax.numpy as jnp, numpy as np, PIL.Image
from vgg_jax import IMAGENET, VGG, Network
model = VGG(depth=16)
shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-3, leaf.dtype), shapes)
Network(model, variables, IMAGENET).save(sys.argv[1])
PIL.Image.effect_noise((500, 375), 90).save(sys.argv[2])
"""

PREDICT = """
import time
start = time.perf_counter()
import json, os, re, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as vgg-jax
import jax
from vgg_jax.cli import predict
from vgg_jax.weights import formats

def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1]) / 1024

seconds = dict(imports=time.perf_counter() - start, reading=0.0, lowering=0.0, compiling=0.0)
imports, parts = peak(), {"backend_compile": "compiling", "jaxpr_trace": "lowering", "jaxpr_to_mlir": "lowering"}

def add(event, duration, **_):
    for key, part in parts.items():
        seconds[part] += duration if key in event else 0.0

jax.monitoring.register_event_duration_secs_listener(add)
read = formats.to_variables

def timed(*arguments, **options):
    began = time.perf_counter()
    variables = read(*arguments, **options)
    seconds["reading"] = time.perf_counter() - began
    return variables

formats.to_variables = timed
code = predict.main(sys.argv[1:])
seconds["inside the process"] = time.perf_counter() - start
used = os.times()
print(json.dumps(dict(code=code, seconds=seconds, processor=used.user + used.system, memory=peak() - imports)))
"""


def first_answer(weights: str, image: str, cache: str) -> dict[str, Any]:
    """Return what one process of `predict` measures, and the seconds of the whole process."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": ROOT}
    code = "import subprocess, sys, time\nstart = time.perf_counter()\nout = subprocess.run(sys.argv[1:], check=True, "
    code += "capture_output=True, text=True).stdout\nprint(time.perf_counter() - start)\nprint(out.splitlines()[-1])"
    command = [sys.executable, "-c", code, sys.executable, "-c", PREDICT, "--weights", weights, image]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    measured: dict[str, Any] = json.loads(out[1])
    return measured | {"total": float(out[0])}


def row(name: str, results: list[dict[str, Any]]) -> str:
    """Return a row of the table: medians over the processes."""
    parts = [[result["total"] for result in results]]
    parts += [[result["seconds"][part] for result in results] for part in ("imports", "reading", "lowering")]
    parts += [[result["seconds"]["compiling"] for result in results], [result["processor"] for result in results]]
    cells = [f"{statistics.median(part):.2f}" for part in parts]
    memory = max(result["memory"] for result in results)
    return f"| {name} | {' | '.join(cells)} | {memory:,.0f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes with an empty and a filled cache (%(default)s)"
    )
    parser.add_argument("--weights", help="a .safetensors file with classes and preprocessing")
    parser.add_argument("--image", help="a photograph")
    parser.add_argument("--no-train", action="store_true", help="only predict")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights, image = os.path.join(folder, "vgg16.safetensors"), os.path.join(folder, "noise.png")
        if not (options.weights and options.image):
            environment = os.environ | {"PYTHONPATH": ROOT}
            subprocess.run([sys.executable, "-c", MAKE, weights, image], env=environment, check=True)
        weights, image = options.weights or weights, options.image or image
        cold = [first_answer(weights, image, os.path.join(folder, f"cache{i}")) for i in range(options.rounds)]
        warm = [first_answer(weights, image, os.path.join(folder, "cache0")) for _ in range(options.rounds)]
        print(
            "| predict | seconds | imports | reading | lowering | compiling | processor seconds | MiB beyond imports |"
        )
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join((row("empty cache", cold), row("filled cache", warm))), flush=True)
        if not options.no_train:
            config, cache = os.path.join(ROOT, "configs", "digits.py"), os.path.join(folder, "train")
            first = seconds_to_first_step(config, cache)
            rest = statistics.median(seconds_to_first_step(config, cache) for _ in range(options.rounds))
            print(f"\nfirst step of train.py after {first:.1f} s, {rest:.1f} s with a filled compilation cache")


if __name__ == "__main__":
    main()
