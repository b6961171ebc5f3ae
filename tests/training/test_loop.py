"""`build` makes what a run trains with, so that benchmarks and experiments need no wiring of their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.training import loop
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.run_weights import load_run
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.whitening import patch_axes

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:1]), (AXIS,))


@pytest.fixture
def config(data_dir):
    """An epoch of zeros and ones in nine steps."""
    data = DataConfig(dataset="digits", data_dir=data_dir, classes=(0, 1), mean=(0.3,), std=(0.3,), exif=False)
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4)),
        data=dataclasses.replace(data, image_size=16, resize=16, pad=2),
        optimizer=OptimizerConfig(learning_rate=0.01, ema_decay=0.9),
        batch_size=32,
        num_epochs=3 / 9,
        log_every_steps=1,
    )


def losses_of(run, inputs):
    state, losses = run.new_state(axes=patch_axes(run)), []
    for batch in inputs:
        state, metrics = run.train_step(state, batch, run.step_key)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_built_run_trains_as_the_command_does(config, mesh, monkeypatch, tmp_path):
    config = dataclasses.replace(config, whitening=True)
    monkeypatch.setattr(loop, "make_mesh", lambda: mesh)
    assert loop.train_and_evaluate(config, str(tmp_path)) == 0
    expected = [line["loss"] for line in read_metrics(str(tmp_path / "metrics.jsonl")) if line["kind"] == "train"]

    run = loop.build(config, mesh)
    order = config.seed, config.step_size, range(run.num_steps)
    assert losses_of(run, run.train_loader.train_inputs(*order)) == expected
    # A step that gathers no images is another program, which may sum in another order.
    assert losses_of(run, run.train_loader.train_batches(*order)) == pytest.approx(expected, rel=1e-6)
    assert len(expected) == 3

    # A run carries its EXIF rule; one from before the field existed turned the images that it predicted.
    assert not load_run(tmp_path).preprocessing.exif
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["data"]["exif"]
    path.write_text(json.dumps(fields))
    assert load_run(tmp_path).preprocessing.exif


def test_built_run_counts_steps(config, mesh):
    config = dataclasses.replace(
        config, num_epochs=2, accumulation_steps=2, eval_every_epochs=0.5, checkpoint_every_epochs=0.01
    )
    run = loop.build(config, mesh)
    assert (run.steps_per_epoch, run.num_steps, run.eval_every, run.checkpoint_every) == (18, 36, 9, 1)
    assert run.image_shape == (16, 16, 1)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), run.shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), run.new_state()) == shapes
