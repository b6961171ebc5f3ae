"""Pictures of the networks, drawn from the code: the columns of the paper, and what a position of a map sees."""

import pathlib
from typing import Any

from matplotlib.patches import Rectangle

from vgg_jax import VGG
from vgg_jax.look import FAINT, INK, picture
from vgg_jax.model import TABLE_1

# One color for each stage, from light to dark, and one each for pools and fully connected layers.
STAGES = ("#cfe3f7", "#a5c9ee", "#78abe0", "#4c8acb", "#2866a8")
POOL, DENSE = "#f0a35e", "#b9a3d9"
FIELDS = {"A": {"depth": 11}, "A-LRN": {"depth": 11, "lrn": True}, "B": {"depth": 13},
          "C": {"depth": 16, "conv1x1": True}, "D": {"depth": 16}, "E": {"depth": 19}}  # fmt: skip


def network(column: str) -> VGG:
    """Return the network of a column of the paper."""
    fields: dict[str, Any] = FIELDS[column]
    return VGG(**fields)


def columns(path: pathlib.Path) -> None:
    """Draw the columns of the paper."""
    with picture(path, (8.6, 8.2)) as figure:
        draw_columns(figure)


def receptive_fields(path: pathlib.Path) -> None:
    """Draw the receptive fields of the columns."""
    with picture(path, (8.6, 4.4)) as figure:
        draw_receptive_fields(figure)


def draw_columns(figure: Any) -> None:
    """Draw the layers of each column from top to bottom; layers of one stage are at one height."""
    axes = figure.subplots()
    tallest = [max(len(stages[s]) for stages in TABLE_1.values()) for s in range(5)]
    for x, column in enumerate(TABLE_1):
        model, y = network(column), 0.0
        axes.text(x, -0.9, column, ha="center", va="bottom", fontsize=12, fontweight="bold")
        axes.text(x, -0.75, f"{model.depth} layers", ha="center", va="top", fontsize=8)
        for number, stage in enumerate(model.stages):
            top = y
            for layer in stage:
                if layer.kind in ("conv", "lrn"):
                    size = f"{layer.kernel_size}x{layer.kernel_size}"
                    text = f"conv {size}, {layer.features}" if layer.kind == "conv" else "LRN"
                    color = STAGES[number] if layer.kernel_size != 1 else "#e3e9ef"
                    box(axes, x, y, 0.8, text, color, "white" if number > 2 and layer.kernel_size != 1 else INK)
                    y += 1
            y = top + tallest[number]
            box(axes, x, y, 0.45, "max pool 2x2", POOL, INK)
            y += 0.75
        for layer in model.head:
            if layer.kind == "dense":
                box(axes, x, y, 0.8, f"{layer.name}, {layer.features}", DENSE, INK)
                y += 1
    axes.set_xlim(-0.55, len(TABLE_1) - 0.45)
    axes.set_ylim(y + 0.1, -1.6)
    axes.axis("off")


def box(axes: Any, x: float, y: float, height: float, text: str, color: str, text_color: str) -> None:
    """Draw one layer as a box with its text."""
    axes.add_patch(Rectangle((x - 0.46, y), 0.92, height, facecolor=color, edgecolor="none"))
    axes.text(x, y + height / 2, text, ha="center", va="center", fontsize=7.5, color=text_color)


def draw_receptive_fields(figure: Any) -> None:
    """Draw the squares that the center of some maps sees, and their sides over the depth of each column."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    geometry = network("D").layer_geometry
    names = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    left.add_patch(Rectangle((0, 0), 224, 224, facecolor="#f6f8fa", edgecolor=FAINT))
    for name, color in reversed(list(zip(names, STAGES, strict=True))):
        pixels = geometry[name].pixels(112 // geometry[name].stride)
        corner = (pixels[0], pixels[0])
        side, label = len(pixels), f"{name}: {len(pixels)}x{len(pixels)}"
        left.add_patch(Rectangle(corner, side, side, facecolor=color, edgecolor="white", lw=0.8, label=label))
    left.set_xlim(-8, 232)
    left.set_ylim(232, -8)
    left.set_aspect("equal")
    left.axis("off")
    left.set_title("VGG-16, 224x224: what a map position sees", fontsize=9)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
    for column, color in zip("ABDE", ("#f0a35e", "#b9a3d9", "#4c8acb", INK), strict=True):
        found = network(column).layer_geometry
        sides = [found[name].receptive_field for name in found if name.startswith("conv")]
        right.plot(range(1, len(sides) + 1), sides, marker="o", markersize=4, color=color, label=f"column {column}")
    right.set_xlabel("convolution")
    right.set_ylabel("side of the receptive field, pixels")
    right.set_xticks(range(1, 17, 2))
    right.legend(frameon=False)
