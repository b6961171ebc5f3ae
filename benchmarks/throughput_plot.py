"""Draw the results of benchmarks/throughput.py.

    python benchmarks/throughput_plot.py FILE.json FILE.png

Each cell has a panel, each arm a bar: its images per second over those of the fastest PyTorch arm. Whiskers show the
smallest and the largest ratio of a round. The dashed line is the rate of the matrix product.
"""

import itertools
import json
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from vgg_jax.look import INK, OTHERS, OURS, THEIRS, picture

LABELS = {
    "torch_eager": "PyTorch",
    "torch_channels_last": "PyTorch, channels_last",
    "torch_compile": "torch.compile",
    "torch_compile_channels_last": "torch.compile, channels_last",
    "ours": "vgg_jax",
    "program": "vgg_jax, program of your own",
    "network": "vgg_jax, through Network",
    "optimized": "vgg_jax, optimized",
    "plain": "vgg_jax, layers=PLAIN",
    "keras": "Keras on JAX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
    "mnn": "MNN",
}
MODES = {"infer": "inference", "train": "training", "epoch": "an epoch"}


def title(result: dict[str, Any]) -> str:
    """Return the network, the images, the mode and the batch of a cell as text."""
    cell = result["cell"]
    norm = "-BN" if cell["batch_norm"] else ""
    images = f"{cell['size']}x{cell['size']}, batch {cell['batch']}"
    return f"VGG-{cell['depth']}{norm}, {images}, {MODES.get(cell['mode'], cell['mode'])}"


def rounded(rate: float) -> str:
    """Return a rate with four digits."""
    return f"{float(f'{rate:.4g}'):,.0f}" if rate >= 1000 else f"{rate:.4g}"


def color_of(arm: str) -> str:
    """Return the color of an arm's bar."""
    if arm in ("ours", "program", "network", "optimized"):
        return OURS
    return THEIRS if arm.startswith("torch") else OTHERS


def draw_cell(axes: Any, result: dict[str, Any]) -> None:
    """Draw one panel."""
    arms = {name: arm for name, arm in result["arms"].items() if "rounds" in arm}
    best = max((arm["images_per_second"], name) for name, arm in arms.items() if name.startswith("torch"))[1]
    reference = arms[best]
    ceiling = result["ceiling_flops"] / result["flops_per_image"] / reference["images_per_second"]
    widest = ceiling
    for i, (name, arm) in enumerate(arms.items()):
        ratios = [a / b for a, b in zip(arm["rounds"], reference["rounds"], strict=True)]
        ratio = arm["images_per_second"] / reference["images_per_second"]
        axes.barh(i, ratio, color=color_of(name), height=0.72)
        axes.plot([min(ratios), max(ratios)], [i, i], color=INK, linewidth=1)
        end = max(ratio, *ratios)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # in front of the dashed line
        axes.text(end + 0.03, i, f"{rounded(arm['images_per_second'])}/s", va="center", fontsize=8, bbox=box)
        widest = max(widest, end)
    axes.axvline(ceiling, color=INK, linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(arms)), [LABELS.get(name, name) for name in arms])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * widest)
    axes.set_title(title(result), loc="left", fontsize=9)
    axes.set_xlabel("images/s over the fastest PyTorch variant")


def draw(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Draw the cells of a report that at least three arms ran."""
    results = [result for result in report["cells"] if sum("rounds" in arm for arm in result["arms"].values()) > 2]
    rows = -(-len(results) // 2)
    bars = max(len(result["arms"]) for result in results)
    with picture(path, (10, (0.27 * bars + 0.75) * rows + 0.5), dpi=130) as figure:
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for axes, result in itertools.zip_longest(panels, results):
            if result:
                draw_cell(axes, result)
            else:
                axes.set_axis_off()
        versions, device = report["versions"], report["device"]
        machine = f"{report['processor']}, {report['cores']} cores" if report["platform"] == "cpu" else device
        figure.suptitle(
            f"{machine}; JAX {versions['jax']}, PyTorch {versions['torch'].partition('+')[0]}. "
            "Dashed: rate of the matrix product. Whiskers: range of the rounds.",
            fontsize=8.5,
        )


def main() -> None:
    """Read the file, draw the figure and write it."""
    source, target = sys.argv[1:]
    with open(source) as file:
        draw(target, json.load(file))


if __name__ == "__main__":
    main()
