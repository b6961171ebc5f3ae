"""VGG: Table 1 of the paper, and a loop over it.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015
(arXiv:1409.1556). Sizes, initialisation and batch norm are torchvision's.
"""

import functools
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vgg_jax.convolution import Conv3x3
from vgg_jax.layers import BatchNorm, adaptive_avg_pool, dense_product, local_response_norm, max_pool

# Table 1: the convolutions of each stage, by their number of channels. Their kernels are 3x3, except that the last
# one of stages 3 to 5 in column C is 1x1; column A-LRN normalises after conv1_1. A max pool ends each stage.
TABLE_1 = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "A-LRN": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "B": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "C": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}
COLUMNS = {11: "A", 13: "B", 16: "D", 19: "E"}

WITH_PARAMETERS = ("conv", "bn", "dense")

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.normal(0.01)


class Layer(NamedTuple):
    """One layer of a network."""

    kind: str  # conv, bn, relu, lrn, pool, dense or dropout
    name: str  # the paper's: conv3_1
    features: int = 0  # the output channels of a convolution or dense layer
    kernel_size: int = 0  # of a convolution


class VGG(nn.Module):
    """A network of the paper, as a map from images to logits.

    Call with images (N, H, W, C), float and already normalised, any C, H and W at least 2 ** len(pool_after); returns
    logits (N, num_classes) in at least float32. `train=True` uses the batch's statistics and dropout: pass
    `rngs={"dropout": key}` and `mutable=["batch_stats"]`.

    Layers are named as in the paper: conv1_1, bn1_1, relu1_1, pool1, ..., pool5, fc6, relu6, fc7, relu7, fc8.

    Raises:
      ValueError: where a field, or the size of the images, is not one of those allowed.
    """

    depth: int = 16  # 11, 13, 16, 19: columns A, B, D, E
    batch_norm: bool = False  # after every convolution
    lrn: bool = False  # with depth 11: column A-LRN
    conv1x1: bool = False  # with depth 16: column C
    num_classes: int | None = 1000  # None: no last layer, the output is the representation
    pool_size: int = 7  # the adaptive average pool's output, pool_size x pool_size
    hidden: tuple[int, ...] = (4096, 4096)  # the widths of fc6 and fc7; () has fc8 only
    pool_after: tuple[int, ...] = (1, 2, 3, 4, 5)  # the stages that end in a max pool
    dropout_rate: float = 0.5  # after fc6 and fc7
    dtype: Any = jnp.float32  # of the computation
    param_dtype: Any = jnp.float32
    remat: bool = False  # recompute each stage in the backward pass, to save memory
    fast: bool = True  # convolutions and max pools of vgg_jax's own; False: XLA's, which jax.jvp can differentiate too
    head_sharding: jax.sharding.Sharding | None = None  # how the inputs of fc6 to fc8 lie on devices: vgg_jax.parallel

    def __post_init__(self) -> None:
        classes = self.num_classes
        problems = [
            (self.depth in COLUMNS, f"depth is {self.depth}; expected 11, 13, 16 or 19"),
            (not self.lrn or self.depth == 11, f"lrn is column A-LRN: it needs depth 11, not {self.depth}"),
            (not self.conv1x1 or self.depth == 16, f"conv1x1 is column C: it needs depth 16, not {self.depth}"),
            (classes is None or classes > 0, f"num_classes is {classes}; expected 1 or more, or None"),
            (self.pool_size > 0, f"pool_size is {self.pool_size}; expected 1 or more"),
            (len(self.hidden) <= 2 and all(width > 0 for width in self.hidden),
             f"hidden is {self.hidden}; expected at most two positive widths, of fc6 and fc7"),
            (tuple(self.pool_after) == tuple(s for s in range(1, 6) if s in self.pool_after),
             f"pool_after is {self.pool_after}; expected stages from 1 to 5 in rising order"),
            (0 <= self.dropout_rate < 1, f"dropout_rate is {self.dropout_rate}; expected at least 0 and below 1"),
        ]  # fmt: skip
        for holds, problem in problems:
            if not holds:
                raise ValueError(problem)
        super().__post_init__()

    @property
    def stages(self) -> list[list[Layer]]:
        """The convolutional part: the layers of each of the five stages, in order."""
        column = "A-LRN" if self.lrn else "C" if self.conv1x1 else COLUMNS[self.depth]
        stages = []
        for s, widths in enumerate(TABLE_1[column], 1):
            layers = []
            for i, features in enumerate(widths, 1):
                kernel_size = 1 if column == "C" and i == 3 else 3
                layers.append(Layer("conv", f"conv{s}_{i}", features, kernel_size))
                if self.batch_norm:
                    layers.append(Layer("bn", f"bn{s}_{i}"))
                layers.append(Layer("relu", f"relu{s}_{i}"))
                if column == "A-LRN" and s == 1:
                    layers.append(Layer("lrn", "lrn1"))
            if s in self.pool_after:
                layers.append(Layer("pool", f"pool{s}"))
            stages.append(layers)
        return stages

    @property
    def head(self) -> list[Layer]:
        """The fully connected part, after the adaptive pool, in order."""
        layers = []
        for i, features in enumerate(self.hidden, 6):
            layers += [Layer("dense", f"fc{i}", features), Layer("relu", f"relu{i}"), Layer("dropout", f"drop{i}")]
        if self.num_classes is not None:
            layers.append(Layer("dense", "fc8", self.num_classes))
        return layers

    @property
    def layer_names(self) -> list[str]:
        """The names of all layers, in order."""
        return [layer.name for part in (*self.stages, self.head) for layer in part]

    def layers_with_parameters(self, names: Collection[str]) -> list[str]:
        """The convolutions, batch norms and dense layers that `names` mean, in order.

        Args:
          names: names of such layers; `features` means all those of the convolutional part, `head` the others.

        Raises:
          ValueError: where a name is none of these.
        """
        parts = {"features": [layer for stage in self.stages for layer in stage], "head": self.head}
        groups = {part: [x.name for x in layers if x.kind in WITH_PARAMETERS] for part, layers in parts.items()}
        known = groups["features"] + groups["head"]
        unknown = [name for name in names if name not in groups and name not in known]
        if unknown:
            raise ValueError(f"found no layer {', '.join(unknown)} with parameters; expected some of "
                             f"{', '.join([*groups, *known])}")  # fmt: skip
        meant = {layer for name in names for layer in groups.get(name, [name])}
        return [layer for layer in known if layer in meant]

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        last_layer: str | None = None,
        average_pool: bool = False,
        frozen: Collection[str] = (),
    ) -> jax.Array:
        """From images (N, H, W, C) to logits (N, num_classes), as the class says.

        Computes up to and including `last_layer`, if one is named; `average_pool` averages where the network takes
        maxima; the layers `frozen` (as for `layers_with_parameters`) work as in evaluation whatever `train` says:
        batch norm keeps its running statistics. The output of every layer computed is sown, by its name, into
        `intermediates/outputs`.
        """
        self._check(images)
        names = self.layer_names
        frozen = self.layers_with_parameters(frozen)
        computed = set(names if last_layer is None else names[: names.index(last_layer) + 1])

        def run(self: "VGG", x: jax.Array, layers: list[Layer]) -> jax.Array:
            for layer in layers:
                if layer.name in computed:
                    x = self._apply_layer(layer, x, train and layer.name not in frozen, average_pool)
                    self.sow("intermediates", "outputs", {layer.name: x}, init_fn=dict, reduce_fn=operator.or_)
            return x

        x = images.astype(self.dtype)
        for stage in self.stages:
            run_stage = functools.partial(run, layers=stage)
            x = (nn.remat(run_stage) if self.remat else run_stage)(self, x)
        if last_layer is None or last_layer in [layer.name for layer in self.head]:
            x = adaptive_avg_pool(x, self.pool_size)
            x = run(self, x.reshape(x.shape[0], -1), self.head)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _apply_layer(self, layer: Layer, x: jax.Array, train: bool, average_pool: bool) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype, name=layer.name)
        match layer.kind:
            case "conv":
                size = layer.kernel_size
                if size == 3 and self.fast:
                    return Conv3x3(layer.features, conv_init, **options)(x)
                return nn.Conv(layer.features, (size, size), kernel_init=conv_init, **options)(x)
            case "bn":
                return BatchNorm(**options)(x, use_running_average=not train)
            case "relu":
                return nn.relu(x)
            case "lrn":
                return local_response_norm(x)
            case "pool":
                if self.fast and not average_pool:
                    return max_pool(x)
                return (nn.avg_pool if average_pool else nn.max_pool)(x, (2, 2), (2, 2))
            case "dense":
                if self.head_sharding is not None:
                    x = jax.lax.with_sharding_constraint(x, self.head_sharding)
                elif self.fast:
                    options["dot_general"] = dense_product
                return nn.Dense(layer.features, kernel_init=dense_init, **options)(x)
            case "dropout":
                return nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        raise AssertionError(layer.kind)

    def _check(self, images: jax.Array) -> None:
        smallest = 2 ** len(self.pool_after)
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images have shape {images.shape}; expected (N, H, W, C) with H and W at least {smallest}, "
                f"which {len(self.pool_after)} max pools need"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; expected floats, already normalised")
