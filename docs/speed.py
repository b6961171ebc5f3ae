"""Pictures of measured speed: the methods of the convolution, the growth of time and memory, and steps on a GPU."""

import pathlib
import re
from typing import Any

from vgg_jax.look import COLORS, FAINT, INK, OTHERS, OURS, THEIRS, picture

METHODS = {
    "xla": ("XLA's convolution", THEIRS),
    "im2col": ("im2col", OTHERS),
    "winograd2": ("Winograd F(2x2), whole map", "#c9d9ec"),
    "winograd4": ("Winograd F(4x4), whole map", "#86aed8"),
    "bands": ("Winograd F(4x4), four rows at a time", OURS),
    "karatsuba": ("Karatsuba, on maps of 2x2", COLORS[2]),
}
CASES = {"32:64": "32x32, batch 64", "224:8": "224x224, batch 8"}
PARTS = {"forward": "output", "backward": "gradients"}


def shape_label(shape: dict[str, int]) -> str:
    """Return the side and the channels of a layer in two lines."""
    return f"{shape['side']}x{shape['side']}\n{shape['channels']} to {shape['features']}"


def methods(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Draw the rates of the methods for each layer of benchmarks/convolutions.json."""
    panels = [(case, part) for case in CASES for part in PARTS if part in report["results"].get(case, {})]
    with picture(path, (9, 2.5 * len(panels) + 0.5)) as figure:
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (case, part) in zip(rows, panels, strict=True):
            found = report["results"][case][part]
            draw_layers(axes, found["layers"])
            axes.axhline(found["product_gflops"], color=INK, linestyle="--", linewidth=0.8)
            axes.set_title(f"VGG-16, {CASES[case]}: {PARTS[part]}", loc="left")
            axes.set_ylabel("GFLOP/s")
        handles = {label: bars for axes in rows for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, fontsize=8)


def draw_layers(axes: Any, layers: list[dict[str, Any]]) -> None:
    """Draw a group of bars for each layer, with whiskers over the range of the rounds."""
    names = [name for name in METHODS if any(name in layer["methods"] for layer in layers)]
    for name in names:
        label, color = METHODS[name]
        places, rates, low, high = [], [], [], []
        for i, layer in enumerate(layers):
            present = [other for other in names if other in layer["methods"]]
            if name in present:
                places.append(i + 0.16 * (present.index(name) - (len(present) - 1) / 2))
                rate = layer["methods"][name]
                rates.append(rate["gflops"])
                low.append(rate["gflops"] - rate["range"][0])
                high.append(rate["range"][1] - rate["gflops"])
        whiskers = {"linewidth": 0.7, "ecolor": FAINT}
        axes.bar(places, rates, 0.15, yerr=(low, high), error_kw=whiskers, color=color, label=label)
    axes.set_xticks(range(len(layers)), [shape_label(layer["shape"]) for layer in layers], fontsize=7.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, None)
    axes.grid(axis="y")


def errors(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Draw the largest error of each method against float64, for each layer of benchmarks/convolutions.json."""
    layers = report["results"]["224:8"]["error"]["layers"]
    names = {
        "xla": ("XLA's convolution", THEIRS, "o"),
        "im2col": ("im2col", "#8c959f", "s"),
        "F(2x2): 0, 1, -1": ("F(2x2), points 0, 1, -1", COLORS[2], "v"),
        "F(4x4): 0, +-sqrt(1/2), +-sqrt(2)": (r"F(4x4), points 0, $\pm\sqrt{1/2}$, $\pm\sqrt{2}$", OURS, "D"),
        "F(4x4): 0, 1, -1, 2, -2": ("F(4x4), points 0, 1, -1, 2, -2", COLORS[3], "^"),
        "F(6x6): 0, 1, -1, 2, -2, 1/2, -1/2": ("F(6x6), and 1/2, -1/2", COLORS[4], "P"),
    }
    with picture(path, (9, 3.4)) as figure:
        axes = figure.subplots()
        for name, (label, color, marker) in names.items():
            found = [(i, layer["errors"][name]) for i, layer in enumerate(layers) if name in layer["errors"]]
            axes.plot(*zip(*found, strict=True), marker=marker, color=color, markersize=5, linewidth=1, label=label)
        axes.set_yscale("log")
        axes.set_xticks(range(len(layers)), [shape_label(layer["shape"]) for layer in layers], fontsize=7.5)
        axes.set_ylabel("largest error / largest output")
        axes.grid(axis="y")
        figure.legend(loc="outside right center", fontsize=8)


def table_rows(text: str, heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table of a page whose header begins with a text.

    Args:
      text: the page, Markdown.
      heading: the beginning of the table's header, such as "| network |".

    Returns:
      A dict from the name of the column to the cell for each row.
    """
    lines = text[text.index("\n" + heading) + 1 :].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: table_length(lines)]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def table_length(lines: list[str]) -> int:
    """Return the number of lines that belong to the table at the beginning."""
    return next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))


def growth(path: pathlib.Path, text: str) -> None:
    """Draw the table of benchmarks/growth.md: time and memory over the batch, the images and the depth."""
    rows = table_rows(text, "| network |")

    def number(row: dict[str, str], column: str) -> float:
        return float(row[column].replace(",", ""))

    with picture(path, (9, 5.2)) as figure:
        (batch_time, batch_memory), (size_time, depth_time) = figure.subplots(2, 2)
        for mode, color in (("inference", OURS), ("training", THEIRS)):
            found = [row for row in rows if row["network"] == f"vgg16_bn, {mode}" and row["images"] == "32x32"]
            found = found[: len({row["batch"] for row in found})]  # the sweep of the depth repeats a batch
            batches = [int(row["batch"]) for row in found]
            batch_time.plot(batches, [number(row, "ms an image") for row in found], "o-", color=color, label=mode)
            batch_memory.plot(batches, [number(row, "MiB") for row in found], "o-", color=color, label=mode)
        for axes, name in ((batch_time, "ms an image"), (batch_memory, "MiB beyond imports and weights")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.set(xlabel="batch", ylabel=name, title="VGG-16 with batch norm, 32x32")
            axes.legend()
        sizes = [row for row in rows if row["network"] == "vgg16, inference"]
        sides = [int(row["images"].partition("x")[0]) for row in sizes]
        size_time.plot(sides, [number(row, "ms an image") for row in sizes], "o-", color=OURS)
        size_time.set(xlabel="side of the image", ylabel="ms an image", title="VGG-16, one image", ylim=(0, None))
        size_time.set_xticks([side for side in sides if side not in (32, 224)])
        depths = [row for row in rows if re.fullmatch(r"vgg\d+_bn, training", row["network"]) and row["batch"] == "64"]
        depths = list({row["network"]: row for row in depths}.values())
        depths.sort(key=lambda row: row["network"])
        names = [row["network"].partition("_")[0].replace("vgg", "VGG-") for row in depths]
        bars = depth_time.bar(names, [number(row, "ms an image") for row in depths], 0.6, color=THEIRS)
        depth_time.bar_label(bars, fmt="%.3g", fontsize=8)
        depth_time.set(ylabel="ms an image", title="with batch norm, 32x32, batch 64, training")
        for axes in (batch_time, batch_memory, size_time):
            axes.grid()


def gpu_steps(path: pathlib.Path, text: str) -> None:
    """Draw the table of docs/performance.md with the milliseconds of a step before and after each change on a GPU."""
    rows = table_rows(text, "| GPU | training step |")
    step = change = ""
    labels = []
    for row in rows:
        step = row["training step"] if row["training step"] != "the same" else step
        change = row["change"] if row["change"] != "the same" else change
        labels.append(f"{row['GPU']}: {step}\n{short(change)}")
    with picture(path, (9, 0.62 * len(rows) + 0.8)) as figure:
        axes = figure.subplots()
        for place, name, color in ((-0.2, "before", OTHERS), (0.2, "now", OURS)):
            values = [float(row[name]) for row in rows]
            bars = axes.barh([i + place for i in range(len(rows))], values, 0.36, color=color, label=name)
            axes.bar_label(bars, fmt="%.4g", padding=2, fontsize=8)
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds of a training step, bfloat16")
        axes.legend(loc="upper right")


def short(change: str) -> str:
    """Return a change without the profile that showed it."""
    return re.sub(r"^(and|(first|second) profile:) ", "", change)
