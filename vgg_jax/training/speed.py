"""The operations of a training step, counted from the table of layers, and the peaks of accelerators.

Model FLOP/s are the operations that the network needs, divided by the time. Operations that are done twice, such as
those of rematerialization, count once. MFU (model FLOPs utilization) is their fraction of the peak of the devices, as
in A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, appendix B.
"""

import itertools
import re
from collections.abc import Collection

from vgg_jax.model import VGG

# Dense bfloat16 products with float32 sums, in TFLOP/s of one device, by JAX's `device_kind`. Sparsity is not counted.
PEAK_TFLOPS = {
    r"NVIDIA A100": 312.0,  # NVIDIA A100 Tensor Core GPU, data sheet
    r"NVIDIA H100 80GB HBM3": 989.0,  # H100 SXM. NVIDIA H100 Tensor Core GPU, data sheet: 1,979 with sparsity
    r"NVIDIA H200$": 989.0,  # H200 SXM. NVIDIA H200 Tensor Core GPU, data sheet: 1,979 with sparsity
    r"NVIDIA GeForce RTX 4090$": 165.2,  # NVIDIA Ada GPU Architecture, white paper, appendix A
    r"NVIDIA L4$": 121.0,  # NVIDIA L4 Tensor Core GPU, data sheet: 242 with sparsity
    r"TPU v4$": 275.0,  # Google Cloud, TPU v4, key chip specifications
    r"TPU v5 lite$|TPU v5e$": 197.0,  # Google Cloud, TPU v5e
    r"TPU v5$|TPU v5p$": 459.0,  # Google Cloud, TPU v5p
    r"TPU v6 lite$|TPU v6e$": 918.0,  # Google Cloud, TPU v6e
}


def multiply_adds(model: VGG, size: int, in_channels: int = 3) -> dict[str, int]:
    """Return the multiply-adds of each convolution and dense layer for one image, by the name of the layer.

    Args:
      model: the network.
      size: the height and width of the image in pixels. Pixels at the border count as those inside.
      in_channels: the channels of the image.
    """
    counts, channels = {}, in_channels
    for layer in itertools.chain(*model.stages):
        if layer.kind == "conv":
            counts[layer.name] = size**2 * layer.kernel_size**2 * channels * layer.features
            channels = layer.features
        elif layer.kind == "pool":
            size //= 2
    width = channels * model.pool_size**2
    for layer in model.head:
        if layer.kind == "dense":
            counts[layer.name] = width * layer.features
            width = layer.features
    return counts


def training_flops(
    model: VGG, size: int, in_channels: int = 3, frozen: Collection[str] = (), cached: Collection[str] = ()
) -> int:
    """Return the operations of a training step for one image, two for each multiply-add.

    A layer needs its multiply-adds three times: for the output, for the gradient of its kernel and for the gradient of
    its input. A frozen layer has no gradient of its kernel. No gradient of an input is needed in the first layer that
    trains, nor in the layers before it.

    Args:
      model: the network.
      size: the height and width of the image in pixels.
      in_channels: the channels of the image.
      frozen: the names of the frozen layers.
      cached: the names of the frozen layers whose output is cached.
    """
    counts = {name: n for name, n in multiply_adds(model, size, in_channels).items() if name not in cached}
    total, gradients = sum(counts.values()), False
    for layer, count in counts.items():
        total += count * ((layer not in frozen) + gradients)
        gradients = gradients or layer not in frozen
    return 2 * total


def peak_flops(device_kind: str, dtype: str, given_tflops: float = 0.0) -> float:
    """Return the peak of one device in operations per second; 0.0 if it is unknown.

    Args:
      device_kind: the name of the device, as `jax.Device.device_kind`.
      dtype: the dtype of the computation. Only bfloat16 has published peaks here: the peak of float32 depends on the
        precision that its products are computed with.
      given_tflops: the peak that the user gives, in TFLOP/s, instead of the published one; 0: none.
    """
    if given_tflops or dtype != "bfloat16":
        return given_tflops * 1e12
    return next((1e12 * peak for pattern, peak in PEAK_TFLOPS.items() if re.match(pattern, device_kind)), 0.0)
