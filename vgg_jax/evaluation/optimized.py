"""The programs of a network that is optimized for inference when it is called on a CPU."""

import collections
import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.evaluation.protocols import read_outputs
from vgg_jax.features.activations import layer_activations
from vgg_jax.model import PLAIN, VGG
from vgg_jax.ops.inference_layers import INFERENCE
from vgg_jax.weights.inference import can_optimize, choose_methods, optimize_for_inference

Shape = tuple[int, ...]
Optimized = tuple[VGG, Any]  # a model and its variables
# Vectors of 512 instead of 256 bits make the transforms of Winograd's algorithm faster: one image of 224x224 takes
# VGG-16 43.7 instead of 45.3 ms, one of 32x32 2.75 instead of 2.99 ms (2 cores of an EPYC).
COMPILER_OPTIONS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}
KEPT = 2  # choices of methods whose kernels are kept, for calls that alternate between two shapes of images
# A network computes so many images of `predict` by XLA's convolutions, which compile a second faster.
FIRST_IMAGES = 16


def keeps_layers(model: VGG, layers: Collection[str]) -> bool:
    """Return whether an optimized network has named layers: it has no batch norm, and no layers before it."""
    return not (model.batch_norm and any(name.startswith(("conv", "bn")) for name in layers))


def optimized_on_cpu(model: VGG, variables: Any, shape: Shape, devices: int) -> Optimized:
    """Return a network optimized for one CPU and images (N, H, W, C), or as it is if another device computes it."""
    if jax.default_backend() != "cpu" or devices > 1 or not can_optimize(model):
        return model, variables
    count, *sides, channels = shape
    smallest = model.smallest_image()  # images may be smaller if only the first layers are computed
    return optimize_for_inference(model, variables, (count, *(max(side, smallest) for side in sides), channels))


class NetworkPrograms:
    """The jitted programs of a network, by which its variables are optimized first.

    The optimized variables of the last shapes of images are kept as long as the variables are the same arrays.
    """

    def __init__(self, model: VGG) -> None:
        """Prepare for a network, without its variables."""
        self._model, self._smallest = model, model.smallest_image()
        self._lock = threading.Lock()
        self._leaves: list[Any] = []  # which keeps their ids from being those of other arrays
        self._ids: list[int] = []
        self._usable = False
        self._methods: dict[Shape, tuple[tuple[str, str], ...]] = {}
        self._kept: collections.OrderedDict[Any, Optimized] = collections.OrderedDict()
        self._programs: dict[Any, Any] = {}
        self._predicted = 0

    def logits(self, variables: Mapping[str, Any], images: Any) -> Any:
        """Return the output of the network for images (N, H, W, C)."""
        found = self.optimized(variables, images)
        model, variables = found or (self._model, variables)
        return self._jitted(_apply, model)(variables, images)

    def activations(self, variables: Mapping[str, Any], images: Any, layers: tuple[str, ...]) -> Any:
        """Return the outputs of named layers for images (N, H, W, C)."""
        found = self.optimized(variables, images) if keeps_layers(self._model, layers) else None
        model, variables = found or (self._model, variables)
        return self._jitted(layer_activations, model)(variables, images, layers=layers)

    def predictions(
        self, outputs: str, images: int, shape: Shape, ahead: Callable[[Any, Any], Any] | None = None
    ) -> Callable[[Mapping[str, Any], Any], Any]:
        """Return the function from (variables, images) to outputs, for a number of images in all.

        Args:
          outputs: what the logits mean: softmax, sigmoid or values.
          images: the number of images; the first ones of a network are computed by XLA's convolutions.
          shape: (N, H, W, C) of the largest batch, for which the network is optimized.
          ahead: the program of the network in that form, if it is compiled.
        """
        self._predicted += images
        is_first = (images if ahead else self._predicted) < FIRST_IMAGES

        def outputs_of(variables: Mapping[str, Any], inputs: Any) -> Any:
            model = self._model.clone(layers=PLAIN) if is_first else self._model
            found = None if is_first else self.optimized(variables, jax.ShapeDtypeStruct(shape, inputs.dtype))
            model, variables = found or (model, variables)
            fits = is_first or found is not None or not can_optimize(self._model)  # as the program that was compiled
            return (ahead if ahead and fits else outputs_program(model, outputs))(variables, inputs)

        return outputs_of

    def optimized(self, variables: Mapping[str, Any], images: Any) -> Optimized | None:
        """Return the network and its variables, optimized for images of a shape.

        Args:
          variables: the variables; what is kept is made again if one of its arrays is another than in the last call.
          images: an array (N, H, W, C), or jax.ShapeDtypeStruct.

        Returns:
          None if the network is used as it is: inside a transformation of JAX, on an accelerator or several devices, in
          another dtype than float32, or with variables that can change in place, as arrays of NumPy.
        """
        shape = getattr(images, "shape", ())
        if isinstance(images, jax.core.Tracer):
            return None
        with self._lock:
            # Little Python is run in the usual case: a network has just moved it out of the caches of the processor.
            leaves = jax.tree.leaves(variables)
            same = list(map(id, leaves)) == self._ids
            if same and (methods := self._methods.get(shape)) in self._kept:
                self._kept.move_to_end(methods)
                return self._kept[methods]
            if _is_traced() or len(shape) != 4 or min(shape) < 1 or min(shape[1:3]) < self._smallest:
                return None
            if not same:
                if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                    return None
                self._leaves, self._ids = leaves, list(map(id, leaves))
                self._usable = self._can_use(variables, leaves)
                self._kept.clear()
                self._methods.clear()
            if not self._usable:
                return None
            if shape not in self._methods:
                self._methods[shape] = tuple(choose_methods(self._model, variables, shape).items())
            methods = self._methods[shape]
            if methods not in self._kept:
                while len(self._kept) >= KEPT:
                    self._kept.popitem(last=False)
                model, made = optimize_for_inference(self._model, variables, shape)
                for others, (_, other) in self._kept.items():  # equal kernels are kept once
                    made["params"] |= {name: other["params"][name] for name, _ in set(methods) & set(others)}
                self._kept[methods] = model, made
            self._kept.move_to_end(methods)
            return self._kept[methods]

    def _can_use(self, variables: Mapping[str, Any], leaves: list[Any]) -> bool:
        if (
            jax.default_backend() != "cpu"
            or not can_optimize(self._model)
            or set(variables) - {"params", "batch_stats"}
        ):
            return False
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            return False
        devices = {device for leaf in leaves for device in leaf.devices()}
        return len(devices) == 1 and {device.platform for device in devices} == {"cpu"}

    def _jitted(self, function: Callable[..., Any], model: VGG) -> Any:
        key = function, model is self._model  # not the model itself, whose hash takes longer than a layer
        if key not in self._programs:
            names = ("layers",) if function is layer_activations else ()
            options = None if model is self._model else COMPILER_OPTIONS
            program = jax.jit(functools.partial(function, model), static_argnames=names, compiler_options=options)
            self._programs[key] = program
        return self._programs[key]


def _is_traced() -> bool:
    """Return whether a transformation of JAX traces the caller: then it traces operations on constants too."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _apply(model: VGG, variables: Mapping[str, Any], images: Any) -> Any:
    return model.apply(variables, images)


@functools.lru_cache(maxsize=8)
def outputs_program(model: VGG, outputs: str) -> Any:
    """Return the jitted function from (variables, images) to outputs."""

    def outputs_of(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images)
        return read_outputs(logits, outputs)

    return jax.jit(outputs_of, compiler_options=COMPILER_OPTIONS if model.layers == INFERENCE else None)
