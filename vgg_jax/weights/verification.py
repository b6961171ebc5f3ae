"""The comparison of a network with torchvision's."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights.layouts import to_torch


def error_against_torchvision(model: VGG, variables: Mapping[str, Any]) -> float:
    """Return the relative error of the logits of two random images of 224x224, compared with torchvision's network.

    Args:
      model: a network that torchvision has too.
      variables: its variables.

    Returns:
      The norm of the difference divided by the norm of torchvision's logits, in float32.

    Raises:
      UserError: if PyTorch or torchvision cannot be imported, or torchvision has no such network.
    """
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: builds of torch and torchvision that do not match
        raise UserError(f"--check needs torch and torchvision ({error}): pip install 'vgg_jax[torch]'") from None
    model = model.clone(conv_head=False)  # the same function at 224x224 pixels
    own = VGG(model.depth, model.batch_norm, num_classes=model.num_classes)
    channels = variables["params"]["conv1_1"]["kernel"].shape[2]
    if (model.stages, model.head, model.pool_size, channels) != (own.stages, own.head, 7, 3) or not model.num_classes:
        raise UserError(
            "the network has another head, column, pools or channels than torchvision's networks; --check expects one "
            "of those: omit --check"
        )
    name = f"vgg{model.depth}{'_bn' if model.batch_norm else ''}"
    with torch.device("meta"):  # without memory and random numbers for weights that are replaced
        net = getattr(torchvision.models, name)(weights=None, num_classes=model.num_classes).eval()
    state_dict = to_torch(model, jax.tree.map(lambda a: np.asarray(a, np.float32), variables))
    net.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()}, assign=True)
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    model = model.clone(dtype=np.float32, precision="highest")
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
