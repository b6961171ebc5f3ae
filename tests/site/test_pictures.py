"""The pictures show the figures of their result files, in one look."""

import json
import re

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

from docs import build, directives, pictures, speed
from vgg_jax import look
from vgg_jax.look import picture

ROOT = pictures.ROOT
BY_NAME = {found.target.rpartition("/")[2].partition(".")[0]: found for found in pictures.PICTURES}
CURVE = {"epoch": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.625, 0.75], "loss": [1.5, 1.0, 0.5]}
RUNS = {"runs": {"first": {"eval": CURVE}, "second": {"eval": {**CURVE, "accuracy": [0.25, 0.5, 0.6]}}}}
FLIP = {
    "accuracy": 0.7,
    "images": 30,
    "per_class": {"cat": 0.8, "dog": 0.6, "ship": 0.7},
    "confusion": [[8, 2, 0], [3, 6, 1], [0, 3, 7]],
}
FINAL = {"train": CURVE, "eval": {**CURVE, "accuracy": [0.25, 0.5, 0.6]}, "test": {"flip": FLIP}}
SIZES = [
    {"images_per_class": size, "frozen": {"accuracy": 0.5 + draw / 10}, "scratch": {"accuracy": 0.3}}
    for size in (10, 0)
    for draw in (0, 1)
]


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that the test writes."""
    found, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


def draw(name, folder, result=None):
    """Draw a picture of the list in a folder, from a made-up result or from the file of the repository."""
    found = BY_NAME[name]
    for path in filter(None, (found.source, found.target)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if found.source:
        text = json.dumps(result) if result else (ROOT / found.source).read_text()
        (folder / found.source).write_text(text)
    assert pictures.draw(found, folder)
    return folder / found.target


def heights(axes):
    """Return the heights of the bars of an axes."""
    return [round(bar.get_height(), 4) for bars in axes.containers if hasattr(bars, "patches") for bar in bars.patches]


def test_pictures_without_figures_are_left_out(tmp_path):
    assert not pictures.draw(BY_NAME["cifar10_final"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_picture_has_a_white_background(tmp_path):
    path = draw("cifar10_plain", tmp_path, RUNS)
    with PIL.Image.open(path) as image:
        assert image.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)


def test_picture_leaves_the_settings_of_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    with picture(tmp_path / "a.svg", (2, 2)) as figure:
        figure.subplots()
        assert not matplotlib.rcParams["axes.spines.top"]
    assert {name for name in before if matplotlib.rcParams[name] != before[name]} <= {"backend"}


def test_notebooks_have_the_same_look(tmp_path):
    (tmp_path / "matplotlibrc").write_text(build.matplotlibrc())
    found = matplotlib.rc_params_from_file(tmp_path / "matplotlibrc", use_default_template=False)
    assert tuple(found["axes.prop_cycle"].by_key()["color"]) == look.COLORS
    assert set(found) == {*look.STYLE, "axes.prop_cycle"}
    assert found["axes.edgecolor"] == look.STYLE["axes.edgecolor"]
    assert found["figure.facecolor"] == "white"


def test_failed_picture_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "a.png", (2, 2)):
        1 / 0  # noqa: B018 # any error
    assert not list(tmp_path.iterdir())


def test_equal_figures_give_equal_files(tmp_path):
    contents = [draw("growth", tmp_path).read_bytes() for _ in range(2)]
    assert contents[0] == contents[1]


def test_final_run_shows_curves_and_confusion(tmp_path, figures):
    draw("cifar10_final", tmp_path, FINAL)
    curves, confusion, bars = figures[0].axes
    assert curves.lines[0].get_ydata().tolist() == [50, 62.5, 75]
    assert curves.lines[1].get_ydata().tolist() == [25, 50, 60]
    assert curves.lines[2].get_label() == "test images: 70.00%"
    assert [int(text.get_text()) for text in confusion.texts] == [8, 2, 0, 3, 6, 1, 0, 3, 7]
    np.testing.assert_array_equal(confusion.images[0].get_array().diagonal(), 0)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([60, 70, 80])
    assert "30 test images" in figures[0].get_suptitle()


@pytest.mark.parametrize("name", ["cifar10_search", "cifar10_search_long", "cifar10_plain", "cifar10_comparison"])
def test_curves_of_all_runs_are_drawn(name, tmp_path, figures):
    draw(name, tmp_path, RUNS)
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["first", "second"]
    assert axes.lines[0].get_ydata().tolist() == [50, 62.5, 75]


def test_transfer_shows_means_over_the_draws(tmp_path, figures):
    draw("transfer_cifar10_sizes", tmp_path, {"runs": SIZES, "all_images": 5000})
    (axes,) = figures[0].axes
    frozen, scratch = (container.lines[0] for container in axes.containers)
    assert frozen.get_xdata().tolist() == [10, 5000]
    assert frozen.get_ydata() == pytest.approx([55, 55]) and scratch.get_ydata() == pytest.approx([30, 30])


def test_memory_of_both_runs_is_drawn(tmp_path, figures):
    samples = [{"seconds": 1.0, "mib": 100}, {"seconds": 2.0, "mib": 120}]
    draw("interruptions", tmp_path, {"resident_mib": {"without": samples, "with": samples}})
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[100, 120]] * 2


def test_bars_of_the_convolutions_are_measured(tmp_path, figures):
    draw("convolution_speed", tmp_path)
    results = json.loads((ROOT / "benchmarks/convolutions.json").read_text())["results"]
    layers = results["32:64"]["forward"]["layers"]
    shown = heights(figures[0].axes[0])
    measured = [
        layer["methods"][name]["gflops"] for layer in layers for name in speed.METHODS if name in layer["methods"]
    ]
    assert sorted(shown) == sorted(measured)
    assert len(figures[0].axes) == 4


def test_errors_of_the_convolutions_are_measured(tmp_path, figures):
    draw("convolution_error", tmp_path)
    results = json.loads((ROOT / "benchmarks/convolutions.json").read_text())["results"]
    measured = [layer["errors"]["xla"] for layer in results["224:8"]["error"]["layers"]]
    assert figures[0].axes[0].lines[0].get_ydata().tolist() == measured


def test_picture_of_growth_has_every_row(tmp_path, figures):
    draw("growth", tmp_path)
    rows = speed.table_rows((ROOT / "benchmarks/growth.md").read_text(), "| network |")
    lines = [len(line.get_xdata()) for axes in figures[0].axes[:3] for line in axes.lines]
    assert lines == [6, 6, 6, 6, 7] and len(rows) == 6 + 6 + 7 + 4
    assert heights(figures[0].axes[3]) == [3.67, 6.01, 6.95, 7.96]


def test_picture_of_gpu_steps_has_the_table(tmp_path, figures):
    draw("gpu_steps", tmp_path)
    rows = speed.table_rows((ROOT / "docs/performance.md").read_text(), "| GPU | training step |")
    widths = [bar.get_width() for bar in figures[0].axes[0].patches]
    assert widths == [float(row["before"]) for row in rows] + [float(row["now"]) for row in rows]
    assert len(rows) >= 6


@pytest.mark.parametrize("name", ["throughput", "throughput_gpu"])
def test_bars_of_throughput_are_ratios(name, tmp_path, figures):
    draw(name, tmp_path)
    for axes, cell in zip(
        figures[0].axes, json.loads((ROOT / f"benchmarks/{name}.json").read_text())["cells"], strict=True
    ):
        rates = {arm: found["images_per_second"] for arm, found in cell["arms"].items()}
        best = max(rate for arm, rate in rates.items() if arm.startswith("torch"))
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([rate / best for rate in rates.values()])


def test_page_of_the_convolutions_has_the_measured_rates():
    results = json.loads((ROOT / "benchmarks/convolutions.json").read_text())["results"]["224:8"]
    rows = speed.table_rows((ROOT / "docs/fast_convolutions.md").read_text(), "| layer, batch 8 |")
    assert len(rows) == 8
    for row in rows:
        name, *cells = row.values()
        side, channels, features, part = re.fullmatch(r"(\d+)x\d+, (\d+) to (\d+), (output|gradient).*", name).groups()
        wanted = {"batch": 8, "side": int(side), "channels": int(channels), "features": int(features)}
        layers = results["forward" if part == "output" else "backward"]["layers"]
        (methods,) = [layer["methods"] for layer in layers if layer["shape"] == wanted]
        names = ("xla", "im2col", "winograd2", "winograd4", "bands")
        assert [int(cell) for cell in cells] == [round(methods[name]["gflops"]) for name in names], name


def test_page_of_experiments_has_those_that_exist(tmp_path):
    (tmp_path / "b.md").write_text("# Plain VGG\n\nFigures.\n\n![Accuracy](b.png)\n![More](c.png)\n")
    (tmp_path / "a.md").write_text("# Digits\n\nA table.\n")
    lines = [line for line in directives.experiment_lines(tmp_path) if line]
    assert lines == [
        "[Plain VGG](/experiments/b.md)",
        "![Accuracy](/experiments/b.png)",
        "Without a picture:",
        "- [Digits](/experiments/a.md)",
    ]
