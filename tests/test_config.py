"""Every mistake in a configuration is reported before the first step, in one line that names the accepted values."""

import ast
import dataclasses
import importlib.util
import pathlib
import tomllib

import jax
import pytest

import vgg_jax.config
import vgg_jax.data.transforms
from tests.conftest import raises_user_error
from vgg_jax.cli.overrides import check_field_name
from vgg_jax.config import Config, ModelConfig, field_names
from vgg_jax.training.run_directory import open_run, read_config, resolve_dtype
from vgg_jax.training.validation import check_config, create_model

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_documented(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    check_config(config)
    model = dataclasses.replace(config.model, num_classes=config.model.num_classes or 10)
    assert create_model(resolve_dtype(dataclasses.replace(config, model=model)).model).depth == config.model.depth
    for part in ("Source:", f"Command: python train.py --config configs/{path.name}", "Cost", "esult"):
        assert part in module.__doc__


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("batch_size", 0, "config.batch_size is 0; expected 1 or more"),
        ("batch_size", "64", "config.batch_size is '64'; expected int"),
        ("num_epochs", 0.0, "config.num_epochs is 0.0; expected more than 0"),
        ("seed", -1, "config.seed is -1; expected 0 up to 2**32 - 1"),
        ("model.depth", 15, "config.model.depth is 15; expected 11, 13, 16 or 19"),
        ("model.lrn", True, "config.model.lrn is column A-LRN: it needs depth 11, not 16"),
        ("model.hidden", ("a",), "config.model.hidden is ('a',); expected tuple[int, ...]"),
        ("model.dtype", "float8", "config.model.dtype is 'float8'; expected one of float32, bfloat16, float64"),
        ("data.image_size", 16, "config.data.image_size is 16; expected at least 32, for the max pools"),
        ("data.train_view", "flip", "config.data.train_view is 'flip'; expected one of pad_crop, random_resized_crop"),
        ("data.mean", (0.5,), "config.data.mean is (0.5,); expected as many channels as config.data.std, 3"),
        ("optimizer.learning_rate", -1.0, "config.optimizer.learning_rate is -1.0; expected more than 0"),
        (
            "optimizer.learning_rate",
            float("nan"),
            "config.optimizer.learning_rate is nan; expected finite numbers",
        ),
        ("accumulation_steps", 0, "config.accumulation_steps is 0; expected 1 or more"),
        ("accumulation_steps", 3, "config.batch_size is 128; expected a multiple of config.accumulation_steps, 3"),
        ("optimizer.decayed", "weights", "config.optimizer.decayed is 'weights'; expected one of all, kernels"),
        ("optimizer.ema_decay", 1.0, "config.optimizer.ema_decay is 1.0; expected at least 0 and below 1"),
        ("optimizer.reference_batch_size", -1, "config.optimizer.reference_batch_size is -1; expected 0 or more"),
        ("optimizer.schedule", "poly", "'poly'; expected one of constant, step, cosine, linear, plateau"),
        ("data.pad_mode", "edge", "config.data.pad_mode is 'edge'; expected one of zeros, reflect"),
        ("data.cutout", 33, "config.data.cutout is 33; expected 0 up to config.data.image_size, 32"),
        ("data.cutout", -1, "config.data.cutout is -1; expected 0 up to config.data.image_size, 32"),
    ],
)
def test_wrong_value_is_reported(name, value, line):
    config = Config()
    node = config
    *parents, field = name.split(".")
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, field, value)
    with raises_user_error(line):
        check_config(config)


def test_batch_norm_of_one_value_is_refused():
    """Four max pools leave one pixel of 16x16 in stage 5, so that a micro-batch of one image has one value."""
    config = Config(batch_size=8, accumulation_steps=8)
    config.model.batch_norm, config.model.pool_after = True, (1, 2, 3, 4)
    config.data.image_size = 16
    with raises_user_error("batch_size is 8, in 8 micro-batch(es)", "image_size is 16", "bn5_1 would have 1 value"):
        check_config(config)
    for field, value in (("batch_size", 16), ("accumulation_steps", 4), ("freeze", ("features",))):
        check_config(dataclasses.replace(config, **{field: value}))
    config.model.batch_norm = False
    check_config(config)


def test_alternating_flip_needs_flip():
    config = Config()
    config.data.flip, config.data.alternating_flip = False, True
    with raises_user_error("config.data.alternating_flip is True; expected False, because config.data.flip is False"):
        check_config(config)


def test_all_problems_are_reported_at_once():
    config = Config(batch_size=0, num_epochs=-1)
    config.model.depth = 15
    with raises_user_error("batch_size", "num_epochs", "depth") as _:
        check_config(config)


def test_unknown_field_is_refused_with_a_suggestion():
    with pytest.raises(TypeError, match="batchsize"):
        Config(batchsize=3)
    check_field_name("optimizer.learning_rate")
    with raises_user_error(
        "config.optimizer.learning_rte is not a field; expected one of ",
        "optimizer.weight_decay",
        "; did you mean config.optimizer.learning_rate?",
    ):
        check_field_name("optimizer.learning_rte")
    with raises_user_error("config.xyz is not a field; expected one of ", "batch_size"):
        check_field_name("xyz")
    with raises_user_error("config.model is not a field", "model.depth"):
        check_field_name("model")


def test_field_names_are_all_leaves():
    names = field_names()
    assert {"batch_size", "model.depth", "data.mean", "optimizer.momentum"} <= set(names)
    tree = dataclasses.asdict(Config())
    assert len(names) == sum(len(value) if isinstance(value, dict) else 1 for value in tree.values())


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16"), ("metal", "float32")]
)
def test_auto_dtype_is_chosen_by_platform(platform, dtype, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    config = Config(model=ModelConfig(dtype="auto"))
    check_config(config)
    assert resolve_dtype(config) == Config(model=ModelConfig(dtype=dtype))
    assert capsys.readouterr().out == f"dtype {dtype} (chosen for {platform})\n"
    assert config.model.dtype == "auto"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_resumed_run_keeps_the_stored_dtype(platform, dtype, monkeypatch, capsys, tmp_path):
    stored, auto = (Config(model=ModelConfig(dtype=name)) for name in (dtype, "auto"))
    with open_run(str(tmp_path), stored) as write_config:
        write_config()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with open_run(str(tmp_path), resolve_dtype(auto, str(tmp_path))) as write_config:
        write_config()
    assert capsys.readouterr().out == f"dtype {dtype} (from config.json)\n"
    assert read_config(str(tmp_path)) == stored


def test_bfloat16_on_cpu_logs_a_warning(monkeypatch, capsys):
    config = Config(model=ModelConfig(dtype="bfloat16"))
    for platform in ("gpu", "cpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert resolve_dtype(config) == config
    assert capsys.readouterr().out == "model.dtype=bfloat16 is slow on a CPU: use auto or float32\n"


def test_model_with_unresolved_dtype_is_refused():
    with raises_user_error("dtype is 'auto'; expected float32, bfloat16 or float64"):
        create_model(ModelConfig(dtype="auto", num_classes=10))


def test_model_with_unresolved_classes_is_refused():
    with raises_user_error("num_classes is 0; expected the number of classes of the data"):
        create_model(ModelConfig())


def test_every_field_is_documented_beside_it():
    """The page of the documentation that lists the fields is made of these comments."""
    source = pathlib.Path(vgg_jax.config.__file__).read_text()
    lines = source.splitlines()
    fields = [
        statement
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    ]
    assert len(fields) == len(field_names()) + 3  # and model, data, optimizer
    for field in fields:
        assert "  # " in lines[field.lineno - 1], ast.unparse(field)


def test_training_views_are_those_of_the_data():
    assert vgg_jax.config.TRAIN_VIEWS == vgg_jax.data.transforms.TRAIN_VIEWS


def test_wheel_has_every_package():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "vgg_jax").rglob("*.py")}
    assert sorted(packages) == sorted({".".join(folder.parts) for folder in folders} | {"vgg_jax.configs"})
