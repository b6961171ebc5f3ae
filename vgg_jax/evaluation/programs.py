"""The jitted program of predictions, which can be compiled while the weights are read."""

import contextlib
import functools
import threading
from typing import Any

import jax
import numpy as np

from vgg_jax.evaluation.protocols import read_outputs
from vgg_jax.model import PLAIN, VGG


@functools.lru_cache(maxsize=8)
def outputs_program(model: VGG, outputs: str, images: int) -> Any:
    """Return the jitted function from (variables, images) to outputs, for a number of images in all."""
    # FAST compiles a second longer than PLAIN and saves 0.08 s per image (VGG-16, 2 cores of an EPYC).
    model = model if images >= 16 else model.clone(layers=PLAIN)

    def outputs_of(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images)
        return read_outputs(logits, outputs)

    return jax.jit(outputs_of)


class CompiledAhead:
    """The program of a network's predictions, compiled by a thread while the weights are read.

    Pass `start` to `vgg_jax.load` as `announce`, and the object to `Network.iter_predictions`.
    """

    def __init__(self, images: int, batch_size: int) -> None:
        """Prepare for `images` images in batches of `batch_size`."""
        self.images, self.batch = images, min(images, batch_size)
        self._key: Any = None
        self._thread: threading.Thread | None = None
        self._compiled: Any = None

    def start(self, net: Any) -> None:
        """Start to compile for a `Network` whose variables are jax.ShapeDtypeStruct."""
        if net.preprocessing is None or net.model.num_classes is None:
            return  # it will be refused
        side, channels = net.preprocessing.crop, len(net.preprocessing.mean)
        inputs = jax.ShapeDtypeStruct((self.batch, side, side, channels), np.float32)
        self._key = (net.model, net.outputs, net.preprocessing)
        program = outputs_program(net.model, net.outputs, self.images)

        def compile_program() -> None:
            with contextlib.suppress(Exception):  # the main thread meets the same error when it calls the program
                compiled = program.lower(net.variables, inputs).compile()

                def call(variables: Any, images: np.ndarray) -> Any:
                    # A batch with unreadable images, or the last one, is smaller.
                    return (compiled if images.shape == inputs.shape else program)(variables, images)

                self._compiled = call

        self._thread = threading.Thread(target=compile_program, name="compile")
        self._thread.start()

    def program_of(self, net: Any) -> Any:
        """Wait for the program and return it; None if there is none for this network."""
        if self._thread is not None:
            self._thread.join()
        return self._compiled if self._key == (net.model, net.outputs, net.preprocessing) else None
