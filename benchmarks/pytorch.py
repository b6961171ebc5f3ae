"""torchvision beside a CPU build of PyTorch, for the benchmarks and the tests."""

from typing import Any


def import_torchvision() -> Any:
    """torchvision's wheel expects CUDA's operators: beside a CPU build of PyTorch two of them have to be declared."""
    from torch import library

    try:
        import torchvision
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declared_operators = operators  # they live as long as this
    return torchvision
