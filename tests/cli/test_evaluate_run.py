"""`python -m vgg_jax evaluate --workdir`: the run's own figure, all shipped configurations, labels of every kind."""

import importlib.util
import os

import numpy as np
import optax
import PIL.Image
import pytest

from tests.conftest import photographs, random_variables, write_tfds
from tests.data.archives import encoded
from tests.test_config import CONFIGS
from tests.training.test_losses import shapes_config, shapes_data
from vgg_jax.cli import evaluate
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.evaluation.protocols import PROTOCOLS
from vgg_jax.evaluation.results import Result, right
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.loop import train_and_evaluate
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.run_directory import open_run
from vgg_jax.training.state import TrainState
from vgg_jax.training.validation import create_model

pytestmark = pytest.mark.usefixtures("narrow")


def run(arguments, capsys):
    code = evaluate.main([*map(str, arguments)])
    return code, capsys.readouterr()


def shipped(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def geometry(config):
    """Return what decides about the test scales."""
    data, model = config.data, config.model
    scale = data.train_scale if data.train_view == "scale_crop" else ()
    head = (model.pool_size, model.pool_after, len(model.hidden))
    return (data.image_size, data.resize, scale, *head, len(data.mean))


GEOMETRIES = {geometry(shipped(path)): path for path in reversed(CONFIGS)}


def write_run(workdir, config):
    """Write the directory of a run at step 0 whose outputs differ between images."""
    model = create_model(config.model)
    variables = random_variables(model, config.data.image_size, config.data.image_size, len(config.data.mean))
    variables["params"]["fc8"]["kernel"] *= 100
    parts = dict(params=variables["params"], batch_stats=variables.get("batch_stats", {}))
    with open_run(str(workdir), config) as write_config:
        write_config()
    checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"))
    checkpoints.save(TrainState.create(apply_fn=model.apply, tx=optax.identity(), **parts), None)
    checkpoints.close()


def saved(workdir, protocol="center_crop"):
    return Result.load(os.path.join(workdir, "posteriors", f"{protocol}.npz"))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow) if path.stem in ("cifar10_224", "imagenet") else path
        for path in GEOMETRIES.values()
    ],
    ids=lambda path: path.stem,
)
def test_all_protocols_work_on_shipped_configurations(path, tmp_path, capsys):
    """The networks are narrow, the geometry is the configuration's; the scales are the defaults."""
    import tensorflow_datasets as tfds

    config = shipped(path)
    size, channels = config.data.resize, len(config.data.mean)
    config.model.num_classes = config.model.num_classes or 10
    photo = photographs(1)[0].convert("L" if channels == 1 else "RGB").resize((size + 8, size))
    features = {
        "image": tfds.features.Image(shape=(None, None, channels), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=config.model.num_classes),
    }
    write_tfds(str(tmp_path), "one", "1.0.0", features, {"test": [{"image": encoded(photo, "PNG"), "label": 3}]})
    config.model.depth, config.model.dtype = 11, "float32"
    config.model.hidden = tuple(width // 64 for width in config.model.hidden)
    config.data.dataset, config.data.data_dir, config.data.eval_split = "one", str(tmp_path), "test"
    config.data.classes = ()
    write_run(tmp_path / "run", config)
    code, printed = run(("--workdir", tmp_path / "run", "--protocol", "all"), capsys)
    assert (code, printed.err) == (0, "")
    smallest = {32: (32, 36, 40), 64: (64, 72, 80), 224: (224, 252, 280), 256: (224, 256, 288)}[size]
    for protocol in PROTOCOLS:
        result = saved(tmp_path / "run", protocol)
        np.testing.assert_allclose(result.posteriors.sum(1), 1, rtol=1e-5)
        assert result.test_scales == (smallest if "multi" in protocol else (size,))


@pytest.mark.slow
def test_run_with_flip_and_average_has_its_own_figure(data_dir, tmp_path, capsys):
    """Flipped digits are other shapes, so the flip changes the figure."""
    config = Config(
        ModelConfig(11, num_classes=10),
        DataConfig("digits", data_dir, flip=False, mean=(0.3057,), std=(0.3235,)),
        OptimizerConfig(learning_rate=0.1, ema_decay=0.9),
        batch_size=64,
        num_epochs=1,
        flip_eval=True,
    )
    assert train_and_evaluate(config, str(tmp_path)) == 0
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    code, printed = run(("--workdir", tmp_path), capsys)
    assert code == 0
    result = saved(tmp_path)
    assert right(result).sum() == round(last["accuracy"] * last["count"])
    assert right(result).mean() == last["accuracy"]
    (row,) = (line for line in printed.out.splitlines() if "center_crop with horizontal flip" in line)
    assert f"  {100 - 100 * last['accuracy']:.1f}  " in row
    config.flip_eval = False
    with open_run(str(tmp_path), config) as write_config:
        write_config()
    code, printed = run(("--workdir", tmp_path), capsys)
    assert "with horizontal flip" not in printed.out
    assert right(saved(tmp_path)).sum() != right(result).sum()


def test_flip_is_chosen_beside_the_run(data_dir, tmp_path, capsys):
    config = Config(ModelConfig(11, num_classes=10), DataConfig("digits", data_dir), flip_eval=True)
    config.data.mean, config.data.std = (0.3057,), (0.3235,)
    write_run(tmp_path, config)
    posteriors, titles = {}, {}
    for option in ((), ("--flip",), ("--no-flip",)):
        code, printed = run(("--workdir", tmp_path, *option), capsys)
        assert code == 0
        posteriors[option] = saved(tmp_path).posteriors
        titles[option] = "center_crop with horizontal flip" in printed.out
    assert titles == {(): True, ("--flip",): True, ("--no-flip",): False}
    np.testing.assert_array_equal(posteriors[()], posteriors[("--flip",)])
    assert (posteriors[("--flip",)] != posteriors[("--no-flip",)]).any()
    code, printed = run(("--workdir", tmp_path, "--flip", "--protocol", "dense"), capsys)
    assert code == 2
    assert "with --protocol dense, which always has the horizontal flips; expected center_crop" in printed.err


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Return a directory of two data sets: `several` labels for each image, and `numbers`."""
    import tensorflow_datasets as tfds

    path = tmp_path_factory.mktemp("halves")
    classes = tfds.features.Sequence(tfds.features.ClassLabel(names=["left", "right"]))
    shapes_data(path, "several", classes, lambda sides: np.flatnonzero(sides).tolist())
    shapes_data(
        path, "numbers", tfds.features.Tensor(shape=(2,), dtype=np.float32), lambda sides: sides.astype(np.float32)
    )
    return path


def test_several_labels_have_their_errors_and_a_class_table(halves, tmp_path, capsys):
    write_run(tmp_path, shapes_config(halves, "several", "sigmoid"))
    code, printed = run(("--workdir", tmp_path, "--protocol", "all", "--per-class"), capsys)
    assert code == 0
    assert "error of the labels, %" in printed.out
    result = saved(tmp_path)
    assert result.labels.shape == result.posteriors.shape == (13, 2)
    assert np.abs(result.posteriors.sum(1) - 1).max() > 0.1  # the probabilities are independent
    wrong = 100 - 100 * np.mean((result.posteriors > 0.5) == result.labels)
    (row,) = (line for line in printed.out.splitlines() if "  center_crop" in line)
    assert row.endswith(f"  {wrong:.1f}")
    last = saved(tmp_path, "dense+multi_crop")
    accuracy = 100 * np.mean((last.posteriors[:, 1] > 0.5) == last.labels[:, 1])
    assert printed.out.splitlines()[-1].split()[1:] == [f"{last.labels[:, 1].sum():.0f}", f"{accuracy:.1f}"]


def test_regression_has_a_root_mean_squared_error(halves, tmp_path, capsys):
    write_run(tmp_path, shapes_config(halves, "numbers", "squared_error"))
    code, printed = run(("--workdir", tmp_path, "--protocol", "all"), capsys)
    assert code == 0
    for protocol in PROTOCOLS:
        result = saved(tmp_path, protocol)
        rmse = np.sqrt(np.mean((result.posteriors - result.labels) ** 2))
        assert any(protocol in line and line.endswith(f"  {rmse:.4f}") for line in printed.out.splitlines())


def test_class_table_has_the_accuracy_of_each_class(tmp_path, capsys):
    import tensorflow_datasets as tfds

    random = np.random.default_rng(0)
    features = {"image": tfds.features.Image(encoding_format="png"), "label": tfds.features.ClassLabel(num_classes=4)}
    images = [PIL.Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(12)]
    examples = [{"image": encoded(image, "PNG"), "label": i % 3} for i, image in enumerate(images)]
    write_tfds(str(tmp_path), "few", "1.0.0", features, {"test": examples})
    config = Config(ModelConfig(11, num_classes=4), DataConfig("few", str(tmp_path)))
    write_run(tmp_path / "run", config)
    code, printed = run(("--workdir", tmp_path / "run", "--per-class"), capsys)
    assert code == 0
    result = saved(tmp_path / "run")
    table = [line.split() for line in printed.out.splitlines()[-5:]]
    assert table[0] == ["class", "images", "accuracy,", "%"]
    for label, row in enumerate(table[1:4]):
        accuracy = 100 * (result.posteriors[result.labels == label].argmax(1) == label).mean()
        assert row == [str(label), "4", f"{accuracy:.1f}"]
    assert table[4] == ["3", "0", "-"]
    # Only the scales that are used are checked.
    arguments = ("--workdir", tmp_path / "run", "--scales", 32, 30, "--protocol")
    assert run((*arguments, "dense"), capsys)[0] == 0
    code, printed = run((*arguments, "multi_scale"), capsys)
    assert code == 2
    assert "the test scales are (30, 32); expected 32 or more; set them with --scales" in printed.err


def test_outputs_that_do_not_fit_give_one_line(halves, data_dir, tmp_path, capsys):
    for name, loss in (("several", "sigmoid"), ("numbers", "squared_error")):
        write_run(tmp_path / name, shapes_config(halves, name, loss))
    one = shapes_config(halves, "several", "sigmoid", num_classes=1)
    write_run(tmp_path / "one", one)
    (tmp_path / "names.txt").write_text("right\nleft\n")
    digits = ("--dataset", "digits", "--data-dir", data_dir)
    for arguments, line in (
        (
            ("--workdir", tmp_path / "several", "--outputs", "softmax"),
            "outputs are softmax, and several/test has several",
        ),
        (
            ("--workdir", tmp_path / "several", "--classes", tmp_path / "names.txt"),
            "several/test has the labels left, right; expected right, left, in this order",
        ),
        (("--workdir", tmp_path / "several", "--confusion", tmp_path / "x.png"), "expected one for --confusion"),
        (("--workdir", tmp_path / "numbers", "--per-class"), "has values as outputs; expected classes for --per-class"),
        (("--workdir", tmp_path / "numbers", *digits), "outputs are values, and digits/test has classes"),
        (("--workdir", tmp_path / "one", "--outputs", "softmax"), "one output, whose softmax is always 1; expected"),
        (("--workdir", tmp_path / "one"), "the network has 1 outputs; expected 2"),
    ):
        code, printed = run(arguments, capsys)
        (error,) = printed.err.splitlines()
        assert code == 2
        assert line in error
    assert not (tmp_path / "x.png").exists()
