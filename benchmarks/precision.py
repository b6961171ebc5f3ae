"""The errors of the logits for each precision of float32 products, against float64.

    python benchmarks/precision.py [--gradients] [--simulate] [--networks NAME...] [--size N] [--batch N]

The weights are drawn with He's standard deviation, the images are noise. The reference is computed in float64 on the
CPU. An error is the norm of the difference divided by the norm of the reference. On a GPU or TPU the rows differ; on a
CPU all products of float32 are those of float32, and `--simulate` adds rows that round the factors of each product as
a GPU or TPU does.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from vgg_jax.model import FAST, PLAIN, VGG, Layers

NETWORKS: dict[str, dict[str, Any]] = {"vgg16": dict(depth=16), "vgg16_bn": dict(depth=16, batch_norm=True)}
# The bits of the mantissa that a factor keeps, and the number of parts that a factor is split into.
SIMULATED = {
    "TF32 (GPU: default)": (10, 1),
    "bfloat16 (TPU: default)": (7, 1),
    "bfloat16, 3 products (TPU: high)": (7, 2),
    "bfloat16, 6 products (TPU: highest)": (7, 3),
}


def simulated(mantissa_bits: int, parts: int) -> Layers:
    """Return layers whose products round their factors, as accelerators do, and sum in float32.

    Args:
      mantissa_bits: bits of the mantissa that remain.
      parts: the number of rounded numbers whose sum stands for a factor. Products of two parts that are smaller than
        rounding are left out: 2 parts make 3 products, 3 parts make 6.
    """

    def split(x: jax.Array) -> list[jax.Array]:
        found = []
        for _ in range(parts):
            found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits))
            x = x - found[-1]
        return found

    def of(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def of_parts(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            pairs = [(a, b) for i, a in enumerate(split(x)) for b in split(kernel)[: parts - i]]
            return sum((product(a, b, *args, **kwargs) for a, b in pairs[1:]), product(*pairs[0], *args, **kwargs))

        return of_parts

    return Layers(
        conv=functools.partial(nn.Conv, conv_general_dilated=of(jax.lax.conv_general_dilated)),
        norm=FAST.norm,
        pool=FAST.pool,
        relu=FAST.relu,
        dense=functools.partial(nn.Dense, dot_general=of(jax.lax.dot_general)),
    )


def draw(model: VGG, size: int) -> dict[str, Any]:
    """Return variables of a model: He's weights, small biases, and statistics of batch norm around 0 and 1."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        noise, name = random.standard_normal(shape.shape, np.float32), path[-1].key
        if name == "kernel":
            return np.asarray(noise * np.sqrt(2 / np.prod(shape.shape[:-1])), np.float32)
        return 1 + 0.1 * np.abs(noise) if name in ("scale", "var") else np.float32(0.1) * noise

    variables: dict[str, Any] = jax.tree_util.tree_map_with_path(leaf, shapes)
    return variables


def results(model: VGG, variables: Any, images: np.ndarray, gradients: bool) -> tuple[list[np.ndarray], float]:
    """Return the logits and, on request, the gradients of all parameters; and the images per second of the logits."""
    logits = jax.jit(model.apply)
    variables, images = jax.device_put((variables, images))
    found = [np.asarray(logits(variables, images))]
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.5:
        start = time.perf_counter()
        jax.block_until_ready(logits(variables, images))
        seconds.append(time.perf_counter() - start)
    if gradients:

        def loss(params: Any) -> jax.Array:
            outputs: Any = model.apply({**variables, "params": params}, images)
            return jnp.square(outputs).mean()

        leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"]))
        found.append(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]))
    return found, len(images) / statistics.median(seconds)


def reference(model: VGG, variables: Any, images: np.ndarray, gradients: bool) -> list[np.ndarray]:
    """Return the logits and gradients in float64, computed on the CPU if JAX has it beside an accelerator."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = jax.devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64, layers=PLAIN)
        variables, images = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, images))
        return results(model, variables, images, gradients)[0]


def arms(model: VGG, simulate: bool) -> dict[str, VGG]:
    """Return the networks to compare by the name of their row."""
    rows = {f"precision={name}": model.clone(precision=name) for name in ("default", "high", "highest")}
    rows["dtype=bfloat16"] = model.clone(dtype=jnp.bfloat16)
    if simulate:
        rows |= {name: model.clone(layers=simulated(*kind)) for name, kind in SIMULATED.items()}
    return rows


def main() -> None:
    """Print a table with a row for each network and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="number of images (%(default)s)")
    parser.add_argument("--gradients", action="store_true", help="compare the gradients of all parameters too")
    parser.add_argument("--simulate", action="store_true", help="add rows that round as a GPU or TPU does")
    options = parser.parse_args()
    print("| network | products | error of the logits | largest error | error of the gradients | images/s |")
    print("|---|---|---|---|---|---|")
    images = np.random.default_rng(1).standard_normal((options.batch, options.size, options.size, 3), np.float32)
    for name in options.networks:
        model = VGG(**NETWORKS[name])
        variables = draw(model, options.size)
        expected = reference(model, variables, images, options.gradients)
        for row, arm in arms(model, options.simulate).items():
            actual, rate = results(arm, variables, images, options.gradients)
            errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(actual, expected, strict=True)]
            largest = np.abs(actual[0] - expected[0]).max() / np.abs(expected[0]).max()
            cells = (
                f"{errors[0]:.1e}",
                f"{largest:.1e}",
                f"{errors[1]:.1e}" if options.gradients else "",
                f"{rate:.4g}",
            )
            print(f"| {name} | {row} | {' | '.join(cells)} |", flush=True)
    device = jax.devices()[0]
    print(f"\n{device.platform}: {device.device_kind}; JAX {jax.__version__}; {options.batch} images of {options.size}")


if __name__ == "__main__":
    main()
