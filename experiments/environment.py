"""The machine, versions and command of an experiment, for its result file."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "torch", "torchvision", "keras", "h5py", "onnxruntime")


def environment() -> dict[str, Any]:
    """Return the machine, the versions of the packages that are installed, and the command without folders."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    words = [word if word.startswith("-") else os.path.basename(word.rstrip(os.sep)) for word in sys.argv[1:]]
    return {
        "machine": ", ".join(
            [*_gpus(), _processor(), f"{os.cpu_count()} processors", f"{platform.system()} {platform.machine()}"]
        ),
        "versions": versions,
        "command": " ".join(["python", f"experiments/{os.path.basename(sys.argv[0])}", *words]),
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines of Markdown that state an environment."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [f"Command: `{found['command']}`", "", f"Machine: {found['machine']}. Versions: {versions}."]


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.splitlines() if found.returncode == 0 else []


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
