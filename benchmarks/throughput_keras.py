"""The arm of benchmarks/throughput.py for Keras 3 on JAX; the driver sets the backend."""

import itertools
from typing import Any

import jax
import keras
import numpy as np

from benchmarks.throughput_cells import MOMENTUM, RATE, Cell
from benchmarks.throughput_jax import Ours


class Keras(Ours):
    """Keras: `stateless_call` jitted, and `train_on_batch`. Its weight decay has another definition and is omitted."""

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
        if cell.mode == "epoch":
            raise NotImplementedError("its training takes batches from the host")
        if cell.size != (32 if cell.cifar_head else 224):
            raise NotImplementedError("it has no adaptive pooling")
        super().__init__(cell, weights, images, labels)
        if cell.dtype == "bfloat16":
            keras.mixed_precision.set_global_policy("mixed_bfloat16")
        layers = keras.layers
        makers: dict[str, Any] = {
            "conv": lambda layer: layers.Conv2D(layer.features, 3, padding="same", name=layer.name),
            "bn": lambda layer: layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=layer.name),
            "relu": lambda layer: layers.ReLU(name=layer.name),
            "pool": lambda layer: layers.MaxPooling2D(name=layer.name),
            "dense": lambda layer: layers.Dense(layer.features, name=layer.name),
            "dropout": lambda layer: layers.Dropout(0.0, name=layer.name),
        }
        x = inputs = keras.Input(images.shape[1:])
        for layer in itertools.chain(*self.model.stages):
            x = makers[layer.kind](layer)(x)
        x = layers.GlobalAveragePooling2D()(x) if cell.cifar_head else layers.Flatten()(x)
        for layer in self.model.head:
            x = makers[layer.kind](layer)(x)
        self.net = keras.Model(inputs, layers.Activation("linear", dtype="float32")(x))
        order = ("kernel", "scale", "bias", "mean", "var")
        for name, leaves in self.variables["params"].items():
            leaves = leaves | self.variables.get("batch_stats", {}).get(name, {})
            self.net.get_layer(name).set_weights([leaves[leaf] for leaf in order if leaf in leaves])
        self.variables = {}
        self.predict = jax.jit(lambda values, images: self.net.stateless_call(*values, images, training=False)[0])

    def logits(self) -> Any:
        """Return the logits of the batch, in evaluation mode."""
        kinds = (self.net.trainable_variables, self.net.non_trainable_variables)
        return self.predict([[variable.value for variable in kind] for kind in kinds], self.batch["image"])

    def start_training(self) -> None:
        """Call `compile` of Keras."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.net.compile(keras.optimizers.SGD(RATE, MOMENTUM), loss, jit_compile=True)

    def step(self) -> Any:
        """Run one step; return the logits, or the loss before the update."""
        if self.cell.mode == "infer":
            return self.logits()
        return self.net.train_on_batch(self.batch["image"], self.batch["label"])
