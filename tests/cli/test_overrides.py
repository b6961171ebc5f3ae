"""Names that users type on the command line of `train`, the fields that follow an override, and --help."""

import dataclasses
import subprocess
import sys

import pytest

from tests.conftest import raises_user_error
from tests.test_config import CONFIGS
from vgg_jax.__main__ import SUBCOMMANDS, main
from vgg_jax.cli.fields import help_text
from vgg_jax.cli.overrides import ALIASES, FLAG_ALIASES, check_flag, close_field, with_dependents
from vgg_jax.cli.train import _define_flags, _parse, find_config
from vgg_jax.config import Config, DataConfig, OptimizerConfig, field_names
from vgg_jax.training.validation import check_config

LOADED_BY_ML_COLLECTIONS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("model.lr", "optimizer.learning_rate"),
        ("learning-rate", "optimizer.learning_rate"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("bs", "batch_size"),
        ("batch", "batch_size"),
        ("batch-size", "batch_size"),
        ("batchsize", "batch_size"),
        ("data.batch_size", "batch_size"),
        ("epochs", "num_epochs"),
        ("num_epoch", "num_epochs"),
        ("momentum", "optimizer.momentum"),
        ("nesterov", "optimizer.nesterov"),
        ("image-size", "data.image_size"),
        ("depth", "model.depth"),
        ("dropout", "model.dropout_rate"),
        ("classes", "model.num_classes"),
        ("data.class", "data.classes"),
        ("xyz", None),
    ],
)
def test_typed_name_suggests_the_field(typed, field):
    assert close_field(typed) == field


def test_every_alias_names_a_field_and_is_none():
    assert set(ALIASES.values()) <= set(field_names())
    assert not {alias for alias in ALIASES if alias != alias.lower() or "_" in alias}
    assert not ALIASES.keys() & {name.replace("_", "") for name in field_names()}
    assert set(FLAG_ALIASES.values()) <= set(_define_flags([]))


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--batch_size=32", "--batch_size is not a flag; did you mean --config.batch_size=32?"),
        ("--lr", "--lr is not a flag; did you mean --config.optimizer.learning_rate?"),
        ("--epochs=3", "--epochs is not a flag; did you mean --config.num_epochs=3?"),
        ("--allow-changes", "--allow-changes is not a flag; did you mean --allow_changes?"),
        ("--output=runs/x", "--output is not a flag; did you mean --workdir=runs/x?"),
        ("--wrkdir=x", "--wrkdir is not a flag; did you mean --workdir=x?"),
        ("--xyzzy", "--xyzzy is not a flag; expected --config.FIELD=VALUE or one of --help"),
    ],
)
def test_unknown_flag_suggests_what_is_meant(argument, line):
    with raises_user_error(line):
        check_flag(argument, [*_define_flags([])])


@LOADED_BY_ML_COLLECTIONS
def test_known_flags_and_their_values_pass():
    for flags in (["--summary"], ["--nosummary"], ["-workdir", "--odd"], ["--num_processes", "2"]):
        _parse(["--config", "digits", *flags, "--noconfig.data.flip"])


def test_unknown_config_suggests_the_closest():
    with raises_user_error("--config is 'vgg_16'", "; did you mean vgg16?"):
        find_config("vgg_16")
    with raises_user_error("--config is 'configs/digit.py'", "; did you mean digits?"):
        find_config("configs/digit.py")


def test_short_run_shortens_the_warmup():
    config = Config(num_epochs=1, optimizer=OptimizerConfig(warmup_epochs=5))
    resolved, lines = with_dependents(config, {"num_epochs": 200})
    assert resolved.optimizer.warmup_epochs == 0.5
    assert lines == ["config.optimizer.warmup_epochs is 0.5, was 5: half of config.num_epochs, 1"]
    assert config.optimizer.warmup_epochs == 5
    # A warm-up that the user gave stays, and is refused. So does one that fits.
    for given, epochs in (({"num_epochs": 200, "optimizer.warmup_epochs": 0}, 1), ({"num_epochs": 200}, 6), ({}, 1)):
        same = dataclasses.replace(config, num_epochs=epochs)
        assert with_dependents(same, given) == (same, [])


@pytest.mark.parametrize(
    ("data", "given", "fields"),
    [
        (dict(image_size=64), {"data.image_size": 32}, dict(resize=64)),
        (dict(image_size=16), {"data.image_size": 32}, dict(resize=16)),
        (dict(image_size=112, resize=256), {"data.image_size": 224}, dict(resize=128)),
        (dict(image_size=299, resize=256), {"data.image_size": 224}, dict(resize=342)),
        (dict(image_size=64, resize=80), {"data.image_size": 32, "data.resize": 32}, dict(resize=80)),
        (
            dict(image_size=112, resize=256, train_view="scale_crop"),
            {"data.image_size": 224},
            dict(resize=128, train_scale=(128, 256)),
        ),
        (dict(flip=False, alternating_flip=True), {"data.flip": True}, dict(alternating_flip=False)),
        (dict(flip=False, alternating_flip=True), {"data.flip": True, "data.alternating_flip": False}, {}),
    ],
)
def test_fields_follow_an_override(data, given, fields):
    config = Config(data=DataConfig(**data))
    resolved, lines = with_dependents(config, given)
    assert resolved.data == dataclasses.replace(config.data, **fields)
    changed = {name: value for name, value in fields.items() if getattr(config.data, name) != value}
    assert len(lines) == len(changed)
    for line, (name, value) in zip(lines, changed.items(), strict=True):
        assert line.startswith(f"config.data.{name} is {value}, was {getattr(config.data, name)}: ")


def test_step_epochs_after_the_end_are_named():
    config = Config(num_epochs=20, optimizer=OptimizerConfig(schedule="step", step_epochs=(10, 30, 60)))
    resolved, lines = with_dependents(config, {"num_epochs": 90})
    assert resolved == config
    assert lines == ["config.optimizer.step_epochs has 30, 60, not before the end, config.num_epochs 20"]
    constant = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    assert with_dependents(constant, {"num_epochs": 90})[1] == []


@LOADED_BY_ML_COLLECTIONS
def test_command_line_resolves_what_follows():
    """Twice the same result, as a resumed run needs; a wrong type is reported by the checks."""
    argv = ["--config", "vgg16", "--config.num_epochs=1", "--config.data.image_size=64", "--noconfig.data.flip"]
    config, _, notes = _parse(argv)
    assert (config.optimizer.warmup_epochs, config.data.resize, config.data.alternating_flip) == (0.5, 64, False)
    assert len(notes) == 3
    assert _parse(argv)[0] == config
    with raises_user_error("config.optimizer.warmup_epochs is 5.0; expected 0 or more, below num_epochs"):
        _parse([*argv, "--config.optimizer.warmup_epochs=5"])


@LOADED_BY_ML_COLLECTIONS
@pytest.mark.parametrize("override", ["num_epochs=1", "num_epochs=0.1", "data.image_size=64", "data.image_size=288"])
def test_one_override_suffices_in_all_configurations(override):
    """What depends on the field follows, one line for each change, and the checks accept the result."""
    for path in CONFIGS:
        config, _, lines = _parse(["--config", str(path), f"--config.{override}"])
        check_config(config)
        assert all(line.startswith("config.") and line.count("\n") == 0 for line in lines)
        assert config.optimizer.warmup_epochs < config.num_epochs
        assert config.data.resize >= config.data.image_size


def test_help_has_type_value_and_meaning_of_each_field():
    text = help_text()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for name in field_names():
        assert f"--config.{name}=" in words
    assert "--config.optimizer.weight_decay=0.0005 (float) weight decay, added to the gradient" in words
    assert [text.index(f"{group}:\n") for group in ("model", "data", "optimizer", "run")] == sorted(
        text.index(f"{group}:\n") for group in ("model", "data", "optimizer", "run")
    )


@LOADED_BY_ML_COLLECTIONS
def test_help_shows_the_values_of_a_configuration(capsys):
    assert main(["train", "--config", "digits", "--config.model.depth=13", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--config.batch_size=64\n" in text
    assert "--config.model.depth=13\n" in text


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    if command == "train":
        assert main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "\n\n" in text


def test_help_works_without_the_checkout(tmp_path):
    """The comments beside the fields are read from the installed package."""
    code = "from vgg_jax.cli.fields import help_text; print(help_text())"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "number of layers with weights" in process.stdout


def test_reader_that_leaves_early_gives_no_traceback():
    """As `vgg-jax train --help | head -n 1`."""
    command = [sys.executable, "-m", "vgg_jax", "train", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141
