"""State dicts as people publish them, brought to torchvision's names and NumPy arrays."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vgg_jax.errors import UserError

# The modules whose names differ in timm, where the head consists of convolutions.
TIMM = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


def has_timm_head(names: Iterable[str]) -> bool:
    """Return whether names of a state dict, with any prefix, are those of timm's head of convolutions."""
    return any(f".{name}".endswith(".pre_logits.fc1.weight") for name in names)


def timm_names(arrays: Mapping[str, np.ndarray], pool_size: int) -> dict[str, np.ndarray]:
    """Return the arrays of a state dict of torchvision under timm's names, the inverse of `torchvision_names`.

    Args:
      arrays: from torchvision's names to arrays.
      pool_size: the side of the kernel of fc1.

    Returns:
      From timm's names to arrays in timm's shapes.
    """
    sizes = {"pre_logits.fc1": pool_size, "pre_logits.fc2": 1}
    names = {ours: theirs for theirs, ours in TIMM.items()}
    renamed = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        module = names.get(module, module)
        if module in sizes and leaf == "weight":
            array = array.reshape(len(array), -1, sizes[module], sizes[module])
        renamed[f"{module}.{leaf}"] = array
    return renamed


def torchvision_names(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of a state dict under torchvision's names.

    Removes the prefix `module.` of PyTorch's DataParallel and drops `num_batches_tracked`.

    Args:
      state_dict: torch tensors or NumPy arrays under the names of torchvision or timm.

    Returns:
      From torchvision's names to arrays, which may share memory with `state_dict`.
    """
    arrays = {}
    prefixed = all(name.startswith("module.") for name in state_dict)
    for name, tensor in state_dict.items():
        module, _, leaf = (name.removeprefix("module.") if prefixed else name).rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        try:
            array = to_numpy(tensor)
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        module = "classifier.0" if module == "classifier" else module  # a single layer, as in networks for CIFAR
        if module in TIMM:
            module = TIMM[module]
            # (out, C, 7, 7) and (out, in, 1, 1) have the memory layout of the dense layers.
            array = array.reshape(len(array), -1) if leaf == "weight" else array
        arrays[f"{module}.{leaf}"] = array
    return arrays


def ends_before_the_classes(names: Iterable[str]) -> bool:
    """Return whether names are those of timm with `num_classes=0`: `pre_logits` without `head`."""
    parts = {part for name in names for part in name.split(".")}
    return "pre_logits" in parts and "head" not in parts


def without_empty_classifier(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
    """Drop a classifier that is all NaN, as in torchvision's IMAGENET1K_FEATURES.

    Args:
      arrays: from torchvision's names to arrays.

    Returns:
      The arrays to use, and whether there was such a classifier.
    """
    classifier = [name for name in arrays if name.startswith("classifier.")]
    firsts = [arrays[name].flat[:1] for name in classifier]  # fc6 alone has 411 MB, which need not be read twice
    if not classifier or not np.isnan(firsts).all() or not all(np.isnan(arrays[name]).all() for name in classifier):
        return dict(arrays), False
    return {name: array for name, array in arrays.items() if name not in classifier}, True


def to_numpy(array: Any) -> np.ndarray:
    """Return a NumPy view of a torch tensor or of anything that NumPy accepts; bfloat16 has the dtype of ml_dtypes.

    Raises:
      UserError: if a tensor is sparse, quantized, or larger than the numbers that it holds.
    """
    if hasattr(array, "detach"):
        tensor = array.detach()
        if tensor.is_quantized or str(tensor.layout) != "torch.strided" or tensor.is_meta or tensor.is_complex():
            raise UserError(f"is a {tensor.layout} tensor of {tensor.dtype}; expected a dense tensor of floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"has {tensor.numel():,} elements, more than it holds numbers; expected a dense tensor")
        tensor = tensor.cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            import torch  # here, because only tensors need it

            return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        if str(tensor.dtype).startswith("torch.float8"):
            raise UserError(f"is a tensor of {tensor.dtype}; expected floats of 16 bits or more: convert it first")
        array = tensor.numpy()
    return np.asarray(array)
