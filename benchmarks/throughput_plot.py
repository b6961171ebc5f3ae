"""Draw the results of benchmarks/throughput.py.

    python benchmarks/throughput_plot.py FILE.json FILE.png

Each cell has a panel, each arm a bar: its images per second over those of the fastest PyTorch arm. Whiskers show the
smallest and the largest ratio of a round. The dashed line is the rate of the matrix product.
"""

import itertools
import json
import statistics
import sys
from typing import Any

import matplotlib.figure

LABELS = {
    "torch_eager": "PyTorch",
    "torch_channels_last": "PyTorch, channels_last",
    "torch_compile": "torch.compile",
    "torch_compile_channels_last": "torch.compile, channels_last",
    "ours": "vgg_jax",
    "plain": "vgg_jax, layers=PLAIN",
    "keras": "Keras on JAX",
}


def draw_cell(axes: Any, result: dict[str, Any]) -> None:
    """Draw one panel."""
    arms = {name: arm for name, arm in result["arms"].items() if "rounds" in arm}
    best = max((arm["images_per_second"], name) for name, arm in arms.items() if name.startswith("torch"))[1]
    reference = arms[best]
    for i, (name, arm) in enumerate(arms.items()):
        ratios = [a / b for a, b in zip(arm["rounds"], reference["rounds"], strict=True)]
        ratio = arm["images_per_second"] / reference["images_per_second"]
        color = "tab:red" if name == "ours" else "tab:blue" if name.startswith("torch") else "tab:gray"
        axes.barh(i, ratio, color=color)
        axes.plot([min(ratios), max(ratios)], [i, i], color="black", linewidth=1)
        axes.text(max(ratio, *ratios) + 0.03, i, f"{arm['images_per_second']:.4g}/s", va="center", fontsize=7)
    ceiling = result["ceiling_flops"] / result["flops_per_image"] / reference["images_per_second"]
    axes.axvline(ceiling, color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(arms)), [LABELS[name] for name in arms], fontsize=8)
    axes.invert_yaxis()
    widest = max(max(a / b for a, b in zip(arm["rounds"], reference["rounds"], strict=True)) for arm in arms.values())
    axes.set_xlim(0, 1.25 * max(widest, ceiling))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{result['cell']['name']}, batch {result['cell']['batch']}", fontsize=9)
    axes.set_xlabel("images/s over the fastest PyTorch arm", fontsize=8)


def main() -> None:
    """Read the file, draw the figure and write it."""
    source, target = sys.argv[1:]
    with open(source) as file:
        report = json.load(file)
    results = [result for result in report["cells"] if sum("rounds" in arm for arm in result["arms"].values()) > 3]
    rows = -(-len(results) // 2)
    figure = matplotlib.figure.Figure(figsize=(10, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for axes, result in itertools.zip_longest(panels, results):
        if result:
            draw_cell(axes, result)
        else:
            axes.set_axis_off()
    load = statistics.median(
        cores for result in results for arm in result["arms"].values() for cores in arm.get("cores_of_others", ())
    )
    figure.suptitle(
        f"{report['processor']}, {report['cores']} cores; JAX {report['versions']['jax']}, PyTorch "
        f"{report['versions']['torch']}, Keras {report['versions']['keras']}; other processes used {load:.2f} cores\n"
        "dashed: rate of the matrix product; whiskers: range of the rounds",
        fontsize=8,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
