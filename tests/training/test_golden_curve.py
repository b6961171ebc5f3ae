"""Twenty steps with stored losses: every change of the mathematics of training changes them.

`python -m tests.training.test_golden_curve` rewrites the file after an intended change.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import vgg_jax.model
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG, from_torch
from vgg_jax.config import Config, DataConfig, OptimizerConfig
from vgg_jax.data.augmentation import augment, normalize
from vgg_jax.data.loader import Loader
from vgg_jax.training.inputs import augmentation, open_splits
from vgg_jax.training.optimizer import make_optimizer, make_schedule
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import eval_step, evaluate, train_step

PATH = pathlib.Path(__file__).parent / "golden_curve.json"
STEPS = 20
EVAL_EVERY = 5
# The digits in their size of 8x8. With this mean and deviation, float32 only divides by 255: all CPUs round that alike.
# The rest is in float64, also a constant learning rate; optax computes those of schedules in float32.
DATA = DataConfig(dataset="digits", image_size=8, resize=8, pad=1, mean=(0.0,), std=(1.0,))
CONFIG = Config(
    batch_size=4,
    num_epochs=0.06,
    optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=5e-3, schedule="constant"),
)


def enlarged(images):
    """Repeat each pixel in a square of 8x8."""
    return jnp.repeat(jnp.repeat(4 * images.astype(jnp.float64) - 2, 8, axis=1), 8, axis=2)


def torch_weights():
    """Return a narrow VGG-11 with batch norm, one input channel and a 7x7 head, in torchvision's names and layout.

    It is drawn from uniform numbers, which are the same on every machine and NumPy version.
    """
    random = np.random.RandomState(0)

    def draw(*shape, fan):
        return (2 * random.random_sample(shape) - 1) * np.sqrt(6 / fan)

    arrays, i, channels = {}, 0, 1
    for widths in NARROW_TABLE["A"]:
        for width in widths:
            arrays[f"features.{i}.weight"] = draw(width, channels, 3, 3, fan=9 * channels)
            arrays[f"features.{i}.bias"] = np.zeros(width)
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                arrays[f"features.{i + 1}.{name}"] = np.full(width, value)
            i, channels = i + 3, width
        i += 1
    for i, (outputs, inputs) in {0: (64, channels * 49), 3: (32, 64), 6: (10, 32)}.items():
        arrays[f"classifier.{i}.weight"] = draw(outputs, inputs, fan=4 * inputs)
        arrays[f"classifier.{i}.bias"] = np.zeros(outputs)
    return arrays


def compute_curve(data_dir):
    """Return the training losses of twenty steps, and the evaluation losses after every fifth step."""
    network = VGG(11, True, num_classes=10, hidden=(64, 32), dtype="float64", param_dtype="float64")
    model, variables = from_torch(torch_weights(), network)
    train_split, eval_split = open_splits(Config(data=dataclasses.replace(DATA, data_dir=data_dir)))
    optimizer = make_optimizer(CONFIG.optimizer, make_schedule(CONFIG, len(train_split)))
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=optimizer
    ).replace(step=jnp.asarray(0))

    def view(key, batch):
        batch = augment(key, batch, augmentation(DATA))
        return {**batch, "image": enlarged(batch["image"])}

    step = jax.jit(functools.partial(train_step, augment=view))
    test_view = functools.partial(normalize, mean=DATA.mean, std=DATA.std)
    evaluation = jax.jit(functools.partial(eval_step, normalize=lambda images: enlarged(test_view(images))))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    train_loader, eval_loader = (Loader(split, mesh) for split in (train_split, eval_split.select((), 1)))
    curve = {"train": [], "eval": []}
    for i, batch in enumerate(train_loader.train_batches(0, CONFIG.batch_size, range(STEPS)), 1):
        state, metrics = step(state, batch, jax.random.key(0))
        curve["train"].append(float(metrics["loss"]))
        if i % EVAL_EVERY == 0:
            curve["eval"].append(evaluate(functools.partial(evaluation, state), eval_loader.eval_batches(10))["loss"])
    return curve


def test_losses_equal_the_golden_curve(data_dir, x64, narrow):
    """Compare to 1e-9; instructions of other CPUs (`XLA_FLAGS=--xla_cpu_max_isa=SSE4_2`) change losses by 8e-16."""
    expected, curve = json.loads(PATH.read_text()), compute_curve(data_dir)
    for kind in ("train", "eval"):
        np.testing.assert_allclose(curve[kind], expected[kind], rtol=1e-9, err_msg=kind)


def main():
    import tempfile

    jax.config.update("jax_enable_x64", True)
    vgg_jax.model.TABLE_1 = NARROW_TABLE
    with tempfile.TemporaryDirectory() as data_dir:
        PATH.write_text(json.dumps(compute_curve(data_dir), indent=1) + "\n")


if __name__ == "__main__":
    main()
