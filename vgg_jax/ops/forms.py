"""The choice among forms of an operation, which give equal results at a speed that depends on the platform.

`python benchmarks/variants.py` measures every form on the present device.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import lax


class Choice(NamedTuple):
    """The name of the form of an operation on each platform."""

    cpu: str
    gpu: str
    tpu: str


# The choices for CPUs and GPUs are measured. Those for TPUs follow from how their compiler lowers each form.
CHOICES = {
    "batch_norm": Choice(cpu="two_passes", gpu="maps", tpu="maps"),
    "max_pool": Choice(cpu="slices", gpu="index", tpu="window"),
    "few_channels": Choice(cpu="as_it_is", gpu="filled_up", tpu="as_it_is"),
    "random_crop": Choice(cpu="slices", gpu="slices", tpu="products"),
    "finite": Choice(cpu="product", gpu="stacked", tpu="stacked"),
}


def chosen(operation: str, platform: str) -> str:
    """Return the name of the form of an operation on cpu, gpu or tpu."""
    name: str = getattr(CHOICES[operation], platform)
    return name


def by_platform(operation: str, forms: Mapping[str, Callable[..., Any]], *arguments: Any) -> Any:
    """Return the result of an operation by the form that is chosen for the platform of the compiled program.

    Args:
      operation: a key of `CHOICES`.
      forms: the functions of the operation by name.
      *arguments: the arrays that each of them takes.
    """
    cpu, gpu, tpu = (forms[name] for name in CHOICES[operation])
    if cpu is gpu is tpu:
        return cpu(*arguments)
    return lax.platform_dependent(*arguments, cpu=cpu, tpu=tpu, default=gpu)
