"""The arms of benchmarks/throughput.py for vgg_jax."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.throughput_cells import MEAN, MOMENTUM, RATE, STD, WEIGHT_DECAY, Cell, noise_pixels
from vgg_jax import VGG, from_torch
from vgg_jax.config import OptimizerConfig
from vgg_jax.data.augmentation import Augmentation, augment
from vgg_jax.model import FAST, PLAIN, Layers
from vgg_jax.runtime import compiler_options
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step

DEVICE = jax.devices()[0]


class Ours:
    """vgg_jax: the jitted model, and `train_step` with the state donated."""

    layers: ClassVar[Layers] = FAST

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
        self.cell, self.device, self.on_cpu = cell, DEVICE.device_kind, DEVICE.platform == "cpu"
        if not self.on_cpu and cell.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")  # not TF32
        self.model, self.variables = from_torch(weights, VGG(**cell.fields, layers=self.layers))
        self.predict = jax.jit(self.model.apply)
        self.batch: Any = jax.device_put({"image": images, "label": labels})
        self.wait((self.variables, self.batch))

    def logits(self) -> Any:
        """Return the logits of the batch, in evaluation mode."""
        return self.predict(self.variables, self.batch["image"])

    def start_training(self) -> None:
        """Create the training state from the weights; the steps donate it."""
        config = OptimizerConfig(momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.state = TrainState.create(
            apply_fn=self.model.apply,
            params=self.variables["params"],
            batch_stats=self.variables.get("batch_stats", {}),
            head_layers=self.model.head_layers,
            tx=make_optimizer(config, optax.constant_schedule(RATE)),
        )
        self.variables, self.steps = {}, 0
        self.key = jax.random.key(0)
        self.train: Any = jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())
        self.wait(self.state)

    def start_epochs(self) -> None:
        """Make the next steps take their batches from a shuffled epoch on the device, and augment them."""
        cell = self.cell
        view = functools.partial(augment, options=Augmentation(mean=MEAN, std=STD, pad=4, flip=True))
        steps = cell.examples // cell.batch
        pixels, labels = jax.device_put(noise_pixels(cell))
        shuffle = jax.jit(lambda key: jax.random.permutation(key, cell.examples))

        def step(state: TrainState, batch: Any, key: jax.Array) -> Any:
            order, pixels, labels = batch
            rows = jax.lax.dynamic_slice_in_dim(order, state.step % steps * cell.batch, cell.batch)
            return train_step(state, {"image": pixels[rows], "label": labels[rows]}, key, view)

        def train(state: TrainState, batch: Any, key: jax.Array) -> Any:
            if self.steps % steps == 0:
                self.batch = (shuffle(jax.random.fold_in(key, self.steps)), pixels, labels)
            return jitted(state, self.batch, key)

        self.batch = (shuffle(self.key), pixels, labels)
        jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
        self.train = train

    def step(self) -> Any:
        """Run one step; return the logits, or the loss before the update."""
        if self.cell.mode == "infer":
            return self.logits()
        self.state, metrics = self.train(self.state, self.batch, self.key)
        self.steps += 1
        return metrics["loss"]

    def wait(self, result: Any) -> None:
        """Wait for a result."""
        jax.block_until_ready(result)

    def matrix_product(self, n: int) -> Any:
        """Return a matrix and the function that multiplies by it."""
        a = np.random.default_rng(0).standard_normal((n, n), np.float32) / n**0.5
        b, product = jnp.asarray(a, self.cell.dtype), jax.jit(jnp.matmul)
        return b, lambda c: product(c, b)

    def device_peak(self) -> int:
        """Return the peak memory of an accelerator in bytes; 0 on a CPU."""
        return (DEVICE.memory_stats() or {}).get("peak_bytes_in_use", 0)


class Plain(Ours):
    """The same with Flax's layers: XLA's convolution and max pool."""

    layers = PLAIN
