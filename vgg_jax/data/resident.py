"""Batches of a split that is resident on the devices: the training step gathers them from the rows of the split."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def gather(data: Mapping[str, jax.Array], indices: jax.Array, flipped: jax.Array | None = None) -> dict[str, jax.Array]:
    """Return rows of the data, some of them flipped horizontally.

    Args:
      data: arrays of M rows, among them `image` (M, H, W, C).
      indices: (N,) integers from 0 to M - 1.
      flipped: (N,) bool; None flips no image.

    Returns:
      The same entries with N rows.
    """
    taken = {name: array.at[indices].get(mode="promise_in_bounds") for name, array in data.items()}
    if flipped is not None:
        image = taken["image"]
        taken["image"] = jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)
    return taken


def gathered(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images and labels of a batch of `Loader.train_inputs`, inside a jitted step.

    Args:
      batch: `resident`, the arrays of the whole split, `indices` and perhaps `flipped`, as `gather` takes them; or a
        batch of images and labels, which is returned unchanged.
    """
    if "resident" not in batch:
        return dict(batch)
    return gather(batch["resident"], batch["indices"], batch.get("flipped"))
