"""Training on cached features: the output of the frozen first layers is computed once and kept on disk.

A cached example looks like an image of one row: its pixels are the features of the view and of the flipped view. So a
horizontal flip of this image exchanges them, and loaders, augmentation and evaluation need no other code. The programs
that compute the features have the batch sizes of the programs that they replace, so that on one CPU device the results
have the same bits.
"""

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.config import Config
from vgg_jax.console import Bar, log
from vgg_jax.data.augmentation import Batch, normalize, random_horizontal_flip
from vgg_jax.data.dataset import Split
from vgg_jax.data.feature_store import FeatureStore, read_digests
from vgg_jax.data.labels import Label
from vgg_jax.data.loader import Loader
from vgg_jax.data.resident import gathered
from vgg_jax.errors import UserError
from vgg_jax.model import VGG, WITH_PARAMETERS
from vgg_jax.runtime import compiler_options
from vgg_jax.training.jitting import jit_steps
from vgg_jax.training.run import Run
from vgg_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSplit(Split):
    """A split whose views are cached features: (1, V, D) with V = 2 if the flipped views are cached too."""

    store: FeatureStore
    rows: np.ndarray  # of the store, one for each example
    cached_labels: list[Label]

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """Return the shape (1, V, D) of an example."""
        _, views, width = self.store.rows.shape
        return (1, views, width)

    @property
    def view_dtype(self) -> np.dtype[Any]:
        """Return the dtype of the features."""
        dtype: np.dtype[Any] = self.store.rows.dtype
        return dtype

    @property
    def labels(self) -> np.ndarray:
        """Return the class of each example, (N,) int64."""
        return np.array(self.cached_labels, np.int64)

    def test_view(self, index: int) -> tuple[np.ndarray, Label]:
        """Return the features of an example, (1, V, D), and its label."""
        return self.store.rows[self.rows[index]][None], self.cached_labels[index]


def last_cached_layer(model: VGG, frozen: Collection[str]) -> str | None:
    """Return the last layer of the stages that depends on frozen layers only; None if the first layer trains."""
    layers = itertools.chain(*model.stages)
    fixed = itertools.takewhile(lambda layer: layer.kind not in WITH_PARAMETERS or layer.name in frozen, layers)
    return next((layer.name for layer in reversed(list(fixed))), None)


def with_cached_features(run: Run, state: TrainState) -> tuple[Run, TrainState]:
    """Return a run and its state that train on cached features; compute those that are missing.

    Args:
      run: a run whose first layers are frozen.
      state: its state. The features are those of its frozen layers.

    Raises:
      UserError: if the run has several processes, or the features cannot be kept.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"config.cache_features is True, and the run has {jax.process_count()} processes; expected one: set "
            "config.cache_features=False"
        )
    config, model = run.config, run.model
    layer = last_cached_layer(model, tuple(state.frozen_params))
    assert layer is not None  # `validation.check_config` has refused a first layer that trains
    variables = _variables_up_to(model, layer, state)
    image = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    _, *shape = jax.eval_shape(functools.partial(model.apply, last_layer=layer), variables, image).shape
    splits = [
        _cached(run, run.train_split, layer, variables, config.step_size, config.data.flip, together=False),
        _cached(run, run.eval_split, layer, variables, run.eval_batch_size, config.flip_eval, together=True),
    ]
    apply_fn = _apply_after(model, layer, tuple(shape))
    state, shapes, shardings = (tree.replace(apply_fn=apply_fn) for tree in (state, run.shapes, run.shardings))
    steps = jit_steps(config, run.mesh, shardings, _training_view(config), lambda images: images, run.class_weights)
    changes: dict[str, Any] = {
        **dict(train_split=splits[0], eval_split=splits[1], shapes=shapes, shardings=shardings, steps=steps),
        "cached_layers": tuple(variables["params"]),
    }
    return dataclasses.replace(run, **changes), state


def _variables_up_to(model: VGG, layer: str, state: TrainState) -> dict[str, Any]:
    """Return the variables of the layers up to `layer`; all these layers are frozen."""
    names = model.layer_names[: model.layer_names.index(layer) + 1]
    collections = {"params": state.frozen_params, "batch_stats": state.batch_stats}
    return {kind: {name: tree[name] for name in names if name in tree} for kind, tree in collections.items()}


def _apply_after(model: VGG, layer: str, shape: tuple[int, ...]) -> Callable[..., Any]:
    """Return `model.apply` for cached examples (N, 1, V, D), whose first view reaches the network."""

    def apply(variables: Any, images: jax.Array, **options: Any) -> Any:
        return model.apply(variables, images[:, 0, 0].reshape(-1, *shape), after=layer, **options)

    return apply


def _training_view(config: Config) -> Callable[[jax.Array, Any], Batch]:
    """Return the function from (key, batch of a loader) to the cached examples and labels of the training step."""

    def view(key: jax.Array, rows: Any) -> Batch:
        batch: Batch = gathered(rows)
        if config.data.flip and not config.data.alternating_flip:
            _, flip_key, _ = jax.random.split(key, 3)  # the key of `augmentation.augment`
            batch["image"] = random_horizontal_flip(flip_key, batch["image"])
        return batch

    return view


def _cached(
    run: Run, split: Split, layer: str, variables: dict[str, Any], batch_size: int, flip: bool, together: bool
) -> CachedSplit:
    """Return a split with cached features, after those that are missing are computed.

    Args:
      run: the run.
      split: the split.
      layer: the layer whose output is cached.
      variables: the variables up to this layer.
      batch_size: the images of a batch.
      flip: whether the flipped views are cached too.
      together: whether both views go through the network in one pass, as in evaluation.
    """
    data, model, views = run.config.data, run.model, 1 + flip

    def outputs(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        maps = model.apply(variables, normalize(images, data.mean, data.std), last_layer=layer)
        return jnp.asarray(maps, model.dtype).reshape(len(images), -1)

    image = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.uint8)
    _, width = jax.eval_shape(outputs, variables, image).shape
    facts = {
        "data": split.name,
        "weights": _digest(variables),
        "layer": layer,
        "view": [data.image_size, data.resize, data.exif, split.channels, views],
        "normalization": [data.mean, data.std],
        "precision": [str(jnp.dtype(model.dtype)), str(model.precision)],
        "batch size": [batch_size, together],
        "devices": [run.mesh.size, run.mesh.devices.flat[0].device_kind],
        "version of JAX": jax.__version__,
    }
    store = FeatureStore(run.config.features_dir, facts, (views, width), model.dtype)
    digests, labels = read_digests(split)
    if (store.find(digests) < 0).any():
        with store.locked():
            rows = store.find(digests)
            missing = {digest: i for i, (digest, row) in enumerate(zip(digests, rows, strict=True)) if row < 0}
            new = "new or changed" if store.count else "not cached yet"
            log(f"features of {split.name} after {layer}: {len(missing):,} of {len(split):,} images are {new}")
            program = jax.jit(outputs, compiler_options=compiler_options())
            start = time.perf_counter()
            with store.filling(len(missing)):
                _fill(store, run, split, missing, functools.partial(program, variables), batch_size, flip, together)
            log(f"computed features of {split.name}: {len(missing):,} images in {time.perf_counter() - start:.1f} s")
    else:
        log(f"features of {split.name} after {layer}: all {len(split):,} images are cached in {store.directory}")
    return CachedSplit(**vars(split), store=store, rows=store.find(digests), cached_labels=labels)


def _fill(
    store: FeatureStore,
    run: Run,
    split: Split,
    missing: dict[bytes, int],
    outputs: Callable[[jax.Array], jax.Array],
    batch_size: int,
    flip: bool,
    together: bool,
) -> None:
    """Compute and keep the features of the examples in `missing`, by the digests of their files."""

    def two_views(images: jax.Array) -> jax.Array:
        if not flip:
            return outputs(images)[:, None]
        flipped = images[:, :, ::-1]
        if together:
            both = jnp.stack([images, flipped], 1).reshape(-1, *images.shape[1:])
            return outputs(both).reshape(len(images), 2, -1)
        return jnp.stack([outputs(images), outputs(flipped)], 1)

    digests, indices = list(missing), list(missing.values())
    padded = indices + indices[-1:] * (-len(indices) % batch_size)  # all batches have the same size
    loader = Loader(split.at(padded), run.mesh, resident=False, num_threads=run.config.data.num_threads)
    with Bar(f"computing features of {split.name}", len(indices), "images") as bar:
        for first, batch in zip(range(0, len(indices), batch_size), loader.eval_batches(batch_size), strict=True):
            part = digests[first : first + batch_size]
            store.append(part, np.asarray(jax.device_get(two_views(batch["image"])))[: len(part)])
            bar.update(len(part))


def _digest(variables: dict[str, Any]) -> str:
    """Return the SHA-256 of variables, by their names."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return total.hexdigest()
