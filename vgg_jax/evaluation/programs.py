"""The jitted program of predictions, which can be compiled while the weights are read."""

import contextlib
import threading
from typing import Any

import jax
import numpy as np

from vgg_jax.evaluation.optimized import FIRST_IMAGES, optimized_on_cpu, outputs_program
from vgg_jax.model import PLAIN


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

        def compile_program() -> None:
            with contextlib.suppress(Exception):  # the main thread meets the same error when it calls the program
                model, variables = net.model.clone(layers=PLAIN), net.variables
                if self.images >= FIRST_IMAGES:
                    model, variables = optimized_on_cpu(net.model, variables, inputs.shape, 1)
                program = outputs_program(model, net.outputs)
                compiled = program.lower(variables, inputs).compile()

                def call(variables: Any, images: Any) -> Any:
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
