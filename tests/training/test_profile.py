"""`config.profile` writes a trace of the steps that it names."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.conftest import raises_user_error
from vgg_jax.config import Config, DataConfig, ModelConfig
from vgg_jax.training import loop
from vgg_jax.training.profile import Profile
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.validation import check_config


@pytest.fixture
def config(data_dir, narrow, monkeypatch):
    """A run of nine steps."""
    monkeypatch.setattr(loop, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), (AXIS,)))
    data = DataConfig(dataset="digits", data_dir=data_dir, classes=(0, 1), mean=(0.3,), std=(0.3,))
    return Config(
        model=ModelConfig(depth=11, batch_norm=False, pool_after=(1, 2, 3, 4)),
        data=dataclasses.replace(data, image_size=16, resize=16, pad=2),
        **dict(batch_size=32, num_epochs=1, freeze=("features",)),
    )


def test_profile_holds_the_steps_that_it_names(config, tmp_path, capsys):
    run = dataclasses.replace(config, profile="4:6", steps_per_dispatch=2)
    assert loop.train_and_evaluate(run, str(tmp_path)) == 0
    (directory,) = (tmp_path / "plugins" / "profile").iterdir()
    (trace,) = directory.glob("*.xplane.pb")
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [5, 6]  # the last step of a block of two, and a single step
    with gzip.open(directory / "perfetto_trace.json.gz") as file:
        assert any(event.get("name") == "train" for event in json.load(file)["traceEvents"])
    assert f"profile: steps 4 to 6, in {tmp_path}/plugins/profile" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["5", "0:3", "9:3", "a:b", "1:2:3", "3:", "-1:4", "1 : 2"])
def test_malformed_profiles_are_refused(text):
    with raises_user_error(f"config.profile is {text!r}; expected START:STOP, two rising steps from 1"):
        check_config(Config(profile=text))


def test_profile_after_the_last_step_is_refused(config, tmp_path):
    with raises_user_error("config.profile is '8:10', and the last step of the run is 9; expected steps up to"):
        loop.train_and_evaluate(dataclasses.replace(config, profile="8:10"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_profile_before_a_resumed_step_is_noted(tmp_path, capsys):
    profile = Profile(str(tmp_path), range(2, 5), start=4, end=9)
    assert profile.bounds == ()
    assert "note: config.profile names steps up to 4, and the run resumes after step 4" in capsys.readouterr().err
    assert Profile(str(tmp_path), range(2, 6), start=3, end=9).bounds == (3, 5)
