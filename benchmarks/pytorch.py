"""The import of torchvision with a CPU build of PyTorch, for the benchmarks and the tests."""

from typing import Any


def import_torchvision() -> Any:
    """Import torchvision. Its wheel expects CUDA's operators: a CPU build of PyTorch needs two declared."""
    from torch import library

    try:
        import torchvision
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declared_operators = operators  # keeps the declarations alive
    return torchvision
