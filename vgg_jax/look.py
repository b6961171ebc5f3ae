"""The look of all pictures: fonts, colors, and a white background of their own, readable on light and dark pages."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

# For lines and bars in their order: distinct also for people who confuse red and green, and dark enough on white.
COLORS = ("#2866a8", "#d9792b", "#4a9a6b", "#8a6fc0", "#c2473d", "#6e7781", "#1b9aaa", "#a8791f", "#d65f9e", "#2f353c")
OURS, THEIRS, OTHERS = "#2866a8", "#e9a15b", "#b3bcc6"  # bars of vgg_jax, of PyTorch, and of other programs
INK, FAINT = "#24292f", "#57606a"  # texts; axes and their numbers
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "grid.color": "#dfe4ea",
    "legend.frameon": False,
    "lines.markersize": 3,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.hashsalt": "vgg_jax",  # equal files for equal pictures
}


@contextlib.contextmanager
def picture(path: str | os.PathLike[str], size: tuple[int | float, int | float], dpi: int = 120) -> Iterator[Any]:
    """Give a `matplotlib.figure.Figure` in the look of all pictures, and write it at the end of the block.

    Matplotlib's settings of the process stay as they are. After an error in the block, no file is written.

    Args:
      path: the file; its suffix selects the format, such as .png or .svg.
      size: width and height in inches.
      dpi: pixels for each inch, if the format has pixels.

    Yields:
      An empty figure with constrained layout.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
      OSError: if the file cannot be written.
    """
    import cycler  # here, because only pictures need it; it comes with matplotlib
    import matplotlib
    import matplotlib.figure

    settings: Any = {**STYLE, "axes.prop_cycle": cycler.cycler(color=COLORS)}
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        yield figure
        metadata = {"Date": None} if os.fspath(path).endswith(".svg") else None  # equal files on every day
        figure.savefig(path, dpi=dpi, metadata=metadata)
