"""VGG: Table 1 of the paper, and a loop over it.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015
(arXiv:1409.1556). The initialization and batch norm follow torchvision.
"""

import functools
import itertools
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgg_jax.ops.batch_parts import in_parts, stages_in_parts
from vgg_jax.ops.dense import Dense
from vgg_jax.ops.geometry import PIXEL, Geometry
from vgg_jax.ops.inference_layers import INFERENCE, check_trainable
from vgg_jax.ops.layers import FAST as FAST
from vgg_jax.ops.layers import PLAIN as PLAIN
from vgg_jax.ops.layers import Layers as Layers
from vgg_jax.ops.normalization import local_response_norm
from vgg_jax.ops.pooling import adaptive_pool, average_pool_2x2, enlarge, square_windows
from vgg_jax.ops.precision import PRECISIONS, of_network
from vgg_jax.ops.sizes import surely
from vgg_jax.runtime import apply_defaults

apply_defaults()  # here, because every program imports this module, and usually before its first computation

# Table 1 of the paper: the output channels of the convolutions, by column and stage. A max pool ends each stage. The
# kernels are 3x3, except that the last kernel of stages 3 to 5 in column C is 1x1. Column A-LRN is column A with local
# response normalization after conv1_1.
# fmt: off
TABLE_1 = {
    "A":     ((64,),    (128,),     (256, 256),           (512, 512),           (512, 512)),
    "A-LRN": ((64,),    (128,),     (256, 256),           (512, 512),           (512, 512)),
    "B":     ((64, 64), (128, 128), (256, 256),           (512, 512),           (512, 512)),
    "C":     ((64, 64), (128, 128), (256, 256, 256),      (512, 512, 512),      (512, 512, 512)),
    "D":     ((64, 64), (128, 128), (256, 256, 256),      (512, 512, 512),      (512, 512, 512)),
    "E":     ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}
# fmt: on
HEAD_LAYERS = ("fc6", "fc7", "fc8")  # names that layers of a head with parameters can have
COLUMNS = {11: "A", 13: "B", 16: "D", 19: "E"}  # by depth: the number of convolutions and dense layers
WITH_PARAMETERS = ("conv", "bn", "dense")  # kinds of layers
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.normal(0.01)


class Layer(NamedTuple):
    """One layer of a network."""

    kind: str  # conv, bn, relu, lrn, pool, dense, dropout or average
    name: str  # conv3_1, as in the paper
    features: int = 0  # output channels of a convolution or dense layer
    kernel_size: int = 0  # side of the kernel; of a dense layer as a convolution: 7 for fc6, 1 for fc7 and fc8


class VGG(nn.Module):
    """A network of the paper: a map from images (N, H, W, C) to logits (N, num_classes).

    Layers are named as in the paper: conv1_1, bn1_1, relu1_1, pool1, ..., pool5, fc6, relu6, fc7, relu7, fc8. `stages`
    and `head` are the only description of the layers. Weights, dense evaluation, freezing and sharding read it.

    Raises:
      ValueError: if a field has a value that is not allowed.
    """

    depth: int = 16  # 11, 13, 16 or 19: column A, B, D or E
    batch_norm: bool = False  # batch norm after every convolution
    lrn: bool = False  # column A-LRN, with depth 11
    conv1x1: bool = False  # column C, with depth 16
    num_classes: int | None = 1000  # None: no fc8, the output is the representation
    pool_size: int = 7  # height and width of the adaptive average pool's output
    hidden: tuple[int, ...] = (4096, 4096)  # widths of fc6 and fc7; (): fc8 is the only dense layer
    pool_after: tuple[int, ...] = (1, 2, 3, 4, 5)  # stages that end in a max pool
    final_layer: str | None = None  # relu4_1: the network ends there; its output is that map (N, H, W, C)
    dropout_rate: float = 0.5  # rate of the dropout after fc6 and fc7
    dtype: Any = jnp.float32  # dtype of the computation
    param_dtype: Any = jnp.float32  # dtype of the parameters
    precision: str | None = None  # of float32 products on GPU and TPU: default, high, highest; None: see ops.precision
    head_pool: str = "average"  # or "max": the kind of the adaptive pool before the head
    conv_head: bool = False  # timm's head: fc6 and fc7 slide over the last map, and the mean of relu7's map is taken
    remat: bool = False  # rematerialization: recompute each stage in the backward pass to save memory
    layers: Layers = FAST  # implementations of the layers
    head_sharding: jax.sharding.Sharding | None = None  # sharding of the dense layers' inputs over devices
    batch_norm_groups: int = 1  # consecutive equal parts of a training batch with batch norm statistics of their own
    folded: bool = False  # the convolutions contain their batch norm (see weights.folding): evaluation only

    def __post_init__(self) -> None:
        classes = self.num_classes
        problems = [
            (self.depth in COLUMNS, f"depth is {self.depth}; expected 11, 13, 16 or 19"),
            (not self.lrn or self.depth == 11, f"lrn is column A-LRN: it needs depth 11, not {self.depth}"),
            (not self.conv1x1 or self.depth == 16, f"conv1x1 is column C: it needs depth 16, not {self.depth}"),
            (classes is None or classes > 0, f"num_classes is {classes}; expected 1 or more, or None"),
            (0 < self.pool_size <= 256, f"pool_size is {self.pool_size}; expected 1 to 256"),
            (len(self.hidden) <= 2 and all(width > 0 for width in self.hidden),
             f"hidden is {self.hidden}; expected at most two positive widths, of fc6 and fc7"),
            (tuple(self.pool_after) == tuple(s for s in range(1, 6) if s in self.pool_after),
             f"pool_after is {self.pool_after}; expected stages from 1 to 5 in rising order"),
            (self.head_pool in ("average", "max"), f"head_pool is {self.head_pool!r}; expected 'average' or 'max'"),
            (not self.conv_head or (len(self.hidden) == 2 and self.head_pool == "average"),
             f"conv_head is timm's head: it needs two hidden widths and head_pool 'average', not {self.hidden} and "
             f"{self.head_pool!r}"),
            (not (self.folded and self.batch_norm), "folded is True; expected batch_norm False: it is folded in"),
            (self.batch_norm_groups > 0, f"batch_norm_groups is {self.batch_norm_groups}; expected 1 or more"),
            (0 <= self.dropout_rate < 1, f"dropout_rate is {self.dropout_rate}; expected at least 0 and below 1"),
            (self.precision in (None, *PRECISIONS),
             f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}, or None"),
            (self.final_layer is None or (classes is None and not self.hidden),
             f"final_layer is {self.final_layer}; expected num_classes None and hidden (), because no head follows it"),
        ]  # fmt: skip
        for holds, problem in problems:
            if not holds:
                raise ValueError(problem)
        names = [layer.name for stage in self.stages for layer in stage]
        if self.final_layer not in (None, *names[-1:]):
            raise ValueError(f"final_layer is {self.final_layer}; expected one of {', '.join(names)}")
        super().__post_init__()

    @property
    def column(self) -> str:
        """Return the network's column of Table 1."""
        return "A-LRN" if self.lrn else "C" if self.conv1x1 else COLUMNS[self.depth]

    @property
    def stages(self) -> list[list[Layer]]:
        """Return the layers of each convolutional stage, in order: five stages, or fewer up to `final_layer`."""
        stages: list[list[Layer]] = []
        for s, widths in enumerate(TABLE_1[self.column], 1):
            layers = []
            for i, features in enumerate(widths, 1):
                kernel_size = 1 if self.column == "C" and i == 3 else 3
                layers.append(Layer("conv", f"conv{s}_{i}", features, kernel_size))
                if self.batch_norm:
                    layers.append(Layer("bn", f"bn{s}_{i}"))
                layers.append(Layer("relu", f"relu{s}_{i}"))
            if self.column == "A-LRN" and s == 1:
                layers.append(Layer("lrn", "lrn1"))
            if s in self.pool_after:
                layers.append(Layer("pool", f"pool{s}"))
            names = [layer.name for layer in layers]
            if self.final_layer in names:
                return [*stages, layers[: names.index(self.final_layer) + 1]]
            stages.append(layers)
        return stages

    @property
    def head(self) -> list[Layer]:
        """Return the layers of the fully connected part, which follows the adaptive pool, in order."""
        layers: list[Layer] = []
        for i, features in enumerate(self.hidden, 6):
            size = 1 if layers else self.pool_size
            layers += [Layer("dense", f"fc{i}", features, size), Layer("relu", f"relu{i}")]
            if self.conv_head and i == 7:
                layers.append(Layer("average", "global_pool"))
            layers.append(Layer("dropout", f"drop{i}"))
        if self.num_classes is not None:
            layers.append(Layer("dense", "fc8", self.num_classes, 1 if layers else self.pool_size))
        return layers

    @property
    def head_layers(self) -> tuple[str, ...]:
        """Return the names of the head's layers with parameters, in order."""
        return tuple(layer.name for layer in self.head if layer.kind in WITH_PARAMETERS)

    @property
    def layer_names(self) -> list[str]:
        """Return the names of all layers, in order."""
        return [layer.name for part in (*self.stages, self.head) for layer in part]

    @property
    def layer_geometry(self) -> dict[str, Geometry]:
        """Return the channels, stride, receptive field and padding of every layer, by name, in order.

        Dense layers are convolutions here, as in dense evaluation. `global_pool` has the geometry of the window that
        it averages over the map. Both are exact for images of `pool_size` positions of the last map.
        """
        geometry, found = PIXEL, {}
        for layer in itertools.chain(*self.stages, self.head):
            geometry = geometry.after(layer.kind, layer.features, layer.kernel_size)
            found[layer.name] = geometry
        return found

    def smallest_image(self, last_layer: str | None = None) -> int:
        """Return the smallest height and width of images.

        Args:
          last_layer: the last layer to compute, which may need fewer max pools; by default all are computed.

        Raises:
          ValueError: if the layer is unknown.
        """
        geometry = self.layer_geometry
        if last_layer is not None and last_layer not in geometry:
            raise ValueError(f"found no layer {last_layer}; expected one of {', '.join(geometry)}")
        return geometry[last_layer or self.layer_names[-1]].stride

    def layers_with_parameters(self, names: Collection[str]) -> list[str]:
        """Return the convolutions, batch norms and dense layers that `names` refer to, in order.

        Args:
          names: names of such layers. `features` refers to all of the convolutional part, `stage1` to `stage5` to its
            stages, `head` to all of the head.

        Raises:
          ValueError: if a name is none of these.
        """
        stages = [[layer.name for layer in stage if layer.kind in WITH_PARAMETERS] for stage in self.stages]
        groups = {"features": list(itertools.chain(*stages)), "head": list(self.head_layers)}
        known = groups["features"] + groups["head"]
        groups |= {f"stage{number}": stage for number, stage in enumerate(stages, 1)}
        unknown = [name for name in names if name not in groups and name not in known]
        if unknown:
            raise ValueError(f"found no layer {', '.join(unknown)} with parameters; expected some of "
                             f"{', '.join([*groups, *known])}")  # fmt: skip
        selected = {layer for name in names for layer in groups.get(name, [name])}
        return [layer for layer in known if layer in selected]

    @nn.compact
    def __call__(
        self,
        images: Float[Array | np.ndarray, "n h w c"],
        train: bool = False,
        last_layer: str | None = None,
        average_pool: bool = False,
        frozen: Collection[str] = (),
        after: str | None = None,
    ) -> Float[Array, "n *output"]:
        """Return the logits of images.

        The output of every computed layer is sown into `intermediates/outputs` under its name, in `dtype`. A variable
        `perturbations/NAME` is added to the output of layer NAME: its gradient is that of the output.

        Args:
          images: (N, H, W, C) normalized floats. C is arbitrary; H and W are at least `smallest_image(last_layer)`.
          train: use dropout and the statistics of the batch; pass `rngs={"dropout": key}` and
            `mutable=["batch_stats"]`.
          last_layer: the last layer to compute; by default all are computed.
          average_pool: take averages instead of maxima in the pools of the stages.
          frozen: names of layers that behave as in evaluation even if `train` is True, so that batch norm keeps its
            running statistics; see `layers_with_parameters`.
          after: a layer of the stages, whose output (N, H', W', C') takes the place of the images; only the layers
            after it are computed.

        Returns:
          Logits (N, num_classes), or (N, D) without classes, or the output of `last_layer` or `final_layer`, in at
          least float32.

        Raises:
          ValueError: if a layer is unknown, the images have a wrong shape or dtype, or `train` is True and the network
            is optimized for inference, or its convolutions contain their batch norm and are not frozen.
        """
        names = self.layer_names
        if after is None:
            self._check_images(images, last_layer)
        frozen = self.layers_with_parameters(frozen)
        if train:
            trained = {name for name in names if name.startswith("conv")} - set(frozen)
            check_trainable(self.folded and bool(trained), self.layers.conv is INFERENCE.conv)
        first, stop = (names.index(name) + 1 if name else None for name in (after, last_layer))
        computed = set(names[first:stop])

        def run(self: VGG, x: jax.Array, layers: list[Layer]) -> jax.Array:
            for layer in layers:
                if layer.name in computed:
                    x = self._apply_layer(layer, x, train and layer.name not in frozen, average_pool)
                    if self.has_variable("perturbations", layer.name):
                        x = x + self.get_variable("perturbations", layer.name)
                    self.sow("intermediates", "outputs", {layer.name: x}, init_fn=dict, reduce_fn=operator.or_)
            return x

        x = jnp.asarray(images, self.dtype)
        x, computed = self._first_stages(x, computed, train or after is not None, average_pool)
        for stage in self.stages:
            run_stage = functools.partial(run, layers=stage)
            x = (nn.remat(run_stage) if self.remat else run_stage)(self, x)
        if (last_layer or self.final_layer) is None or last_layer in [layer.name for layer in self.head]:
            x = run(self, self._head_input(x), self.head)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _first_stages(self, x: jax.Array, computed: set[str], whole: bool, average_pool: bool) -> tuple[Any, set[str]]:
        """Return the output of the first stages, computed in parts, and the layers that remain to be computed."""
        maps = [self.layer_geometry[stage[0].name] for stage in self.stages]
        count, parts = stages_in_parts(x, maps, self.layers.conv is INFERENCE.conv)
        layers = [layer.name for stage in self.stages[:count] for layer in stage]
        whole |= self.is_initializing() or self.is_mutable_collection("intermediates")
        whole |= self.layers.conv not in (FAST.conv, INFERENCE.conv) or x.dtype.itemsize < 4
        if whole or parts == 1 or "perturbations" in self.variables or not computed > set(layers):
            return x, computed
        first: Any = functools.partial(self.clone(parent=None).apply, last_layer=layers[-1], average_pool=average_pool)
        return in_parts(first, self.variables, x, parts).astype(self.dtype), computed - set(layers)

    def _head_input(self, x: jax.Array) -> jax.Array:
        """Return the flattened pool of the last map (N, D), or with `conv_head` its windows (N, H, W, D)."""
        size = self.pool_size
        if self.conv_head:
            return square_windows(enlarge(x, size), size)
        x = adaptive_pool(x, size, size, jnp.max if self.head_pool == "max" else jnp.mean)
        return x.reshape(x.shape[0], -1)

    def _apply_layer(self, layer: Layer, x: jax.Array, train: bool, average_pool: bool) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype, name=layer.name)
        if layer.kind in ("conv", "dense"):
            options["precision"] = of_network(self.precision, self.dtype)
        match layer.kind:
            case "conv":
                return self.layers.conv(layer.features, (layer.kernel_size,) * 2, kernel_init=conv_init, **options)(x)
            case "bn":
                groups = {"groups": self.batch_norm_groups} if self.batch_norm_groups > 1 else {}
                return self.layers.norm(**groups, **options)(x, use_running_average=not train)
            case "relu":
                return self.layers.relu(x, self.batch_norm)
            case "lrn":
                return local_response_norm(x)
            case "pool":
                return average_pool_2x2(x) if average_pool else self.layers.pool(x)
            case "dense":
                dense, lead = self.layers.dense, x.shape[:-1]
                options["kernel_init"] = dense_init
                if not all(isinstance(side, int) for side in lead[1:]):  # a map of symbolic size has no reshape
                    return nn.Dense(layer.features, **options)(x)
                x = x.reshape(-1, x.shape[-1])  # because dense_product and the sharding are of matrices
                if self.head_sharding is not None:
                    x = jax.lax.with_sharding_constraint(x, self.head_sharding)
                    # dense_product splits the kernel's rows, which the devices already share.
                    dense = functools.partial(Dense, product=jnp.matmul)
                return dense(layer.features, **options)(x).reshape(*lead, layer.features)
            case "average":
                return x.mean((1, 2))
            case "dropout":
                return jnp.asarray(nn.Dropout(self.dropout_rate, deterministic=not train)(x))
        raise AssertionError(layer.kind)

    def _check_images(self, images: Array | np.ndarray, last_layer: str | None) -> None:
        smallest = self.smallest_image(last_layer)
        if images.ndim != 4 or not surely(lambda: all(side >= smallest for side in images.shape[1:3])):
            fixed = all(isinstance(side, int) for side in images.shape)
            raise ValueError(
                f"images have shape {images.shape}; expected (N, H, W, C) with H and W at least {smallest}, "
                f"which {smallest.bit_length() - 1} max pools need"
                + ("" if fixed else f'; pass constraints such as "h >= {smallest}" to jax.export.symbolic_shape')
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; expected floats; normalize them first")
