"""The time of each form of an operation on the present device: python benchmarks/variants.py [--cases NAME...]

Prints a table of milliseconds, and of the temporary memory of each program, for

  crop    the random crop of a uint8 batch
  pool    the max pools of all stages, output and gradient
  norm    batch norm of all layers, output and gradients; `before` derives the gradient by autodiff over rows
  finite  the check of all gradients, statistics and images
  step    the whole training step: with the forms of `ops.forms.CHOICES`, and with each other form in turn

A case is NETWORK:SIDE:BATCH, such as vgg16:224:128 or vgg16_bn:32:512. `call` in the table is the time of an empty
program with the same arguments: shorter times cannot be seen. Needs jax, flax, optax and numpy only.

`--step batch_norm=whole,max_pool=window` times the step with these forms only, and with those of CHOICES first.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from vgg_jax import VGG
from vgg_jax.config import OptimizerConfig
from vgg_jax.data.augmentation import Augmentation, augment, crop_forms
from vgg_jax.model import TABLE_1
from vgg_jax.ops import normalization
from vgg_jax.ops.batch_statistics import FORMS, normalize_by_batch
from vgg_jax.ops.bilinear import FEW_CHANNELS
from vgg_jax.ops.forms import CHOICES, Choice
from vgg_jax.ops.pooling import MAX_POOLS
from vgg_jax.training.finite import FINITE
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.state import create_train_state
from vgg_jax.training.step import train_step

PAD = 4
PARTS = ("crop", "pool", "norm", "finite", "step")
STEP_FORMS: dict[str, dict[str, Any]] = {
    "random_crop": crop_forms(PAD),
    "max_pool": MAX_POOLS,
    "few_channels": FEW_CHANNELS,
    "batch_norm": FORMS,
    "finite": FINITE,
}


class Case(NamedTuple):
    """A network, the side of its images and the batch size."""

    depth: int
    batch_norm: bool
    side: int
    batch: int
    dtype: Any

    @property
    def model(self) -> VGG:
        """Return the network: with the paper's head from 224 pixels on, else with fc8 alone."""
        head: dict[str, Any] = {} if self.side >= 224 else dict(num_classes=10, pool_size=1, hidden=())
        return VGG(self.depth, self.batch_norm, dtype=self.dtype, **head)

    @property
    def maps(self) -> list[tuple[int, int, int, int]]:
        """Return the shapes of the maps that the convolutions give, by stage and layer."""
        widths = TABLE_1[self.model.column]
        sides = [self.side // 2**stage for stage in range(5)]
        return [(self.batch, side, side, width) for side, stage in zip(sides, widths, strict=True) for width in stage]


def parse_case(text: str, dtype: str) -> Case:
    """Return the case that NETWORK:SIDE:BATCH names."""
    network, side, batch = text.split(":")
    depth = int(network.removeprefix("vgg").removesuffix("_bn"))
    return Case(depth, network.endswith("_bn"), int(side), int(batch), jnp.dtype(dtype))


def before(
    x: jax.Array, scale: jax.Array, bias: jax.Array, running_mean: jax.Array, epsilon: float, groups: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the result of `normalize_by_batch` over image rows, with the gradient of autodiff: the older code."""
    width, channels = x.shape[-2:]
    rows = x.reshape(-1, width * channels)

    def repeat(vector: jax.Array) -> jax.Array:
        return jnp.broadcast_to(vector, (width, channels)).reshape(-1)

    def mean_of(rows: jax.Array) -> jax.Array:
        return rows.mean(0).reshape(width, channels).mean(0)

    mean = mean_of(rows)
    centered = rows - repeat(mean)
    var = mean_of(jnp.square(centered))
    y = centered * repeat(lax.rsqrt(var + epsilon) * scale) + repeat(bias)
    return y.reshape(x.shape), mean, var


def random_maps(shapes: list[tuple[int, ...]], dtype: Any) -> list[jax.Array]:
    """Return maps of normal numbers, drawn on the device."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def outputs_and_gradients(function: Callable[..., jax.Array], *arguments: list[jax.Array]) -> Any:
    """Return the outputs of a function at several layers, and the gradients; the last list holds those of outputs."""
    *inputs, slopes = arguments
    results = []
    for *layer, dy in zip(*inputs, slopes, strict=True):
        y, pull_back = jax.vjp(function, *layer)
        results.append((y, pull_back(dy)))
    return results


def crop_programs(case: Case) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the forms of the random crop."""
    side = case.side + 2 * PAD
    images = jax.random.randint(jax.random.key(0), (case.batch, side, side, 3), 0, 256, jnp.uint8)
    corners = jax.random.randint(jax.random.key(1), (case.batch, 2), 0, 2 * PAD + 1)
    for name, form in crop_forms(PAD).items():
        yield name, jax.jit(form), (images, corners)


def pool_programs(case: Case) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the forms of the max pools of all stages."""
    last = np.cumsum([len(stage) for stage in TABLE_1[case.model.column]]) - 1
    shapes = [case.maps[i] for i in last]
    x = random_maps(shapes, case.dtype)
    dy = random_maps([(n, h // 2, w // 2, c) for n, h, w, c in shapes], case.dtype)
    for name, form in MAX_POOLS.items():
        yield name, jax.jit(functools.partial(outputs_and_gradients, form)), (x, dy)


def norm_programs(case: Case) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the forms of batch norm of all layers."""
    x, dy = (random_maps(list(case.maps), case.dtype) for _ in range(2))
    ones, zeros = ([jnp.full(shape[-1], value) for shape in case.maps] for value in (1.0, 0.0))

    def layer(form: str, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        normalize = before if form == "before" else normalize_by_batch
        y: jax.Array = normalize(x.astype(jnp.float32), scale, bias, jnp.zeros_like(bias), 1e-5)[0]
        return jax.nn.relu(y.astype(x.dtype))

    chosen = CHOICES["batch_norm"]
    for name in (*FORMS, "before"):
        CHOICES["batch_norm"] = chosen if name == "before" else Choice(name, name, name)
        program = functools.partial(outputs_and_gradients, functools.partial(layer, name))
        yield name, jax.jit(program), (x, ones, zeros, dy)  # lowered while this form is chosen
    CHOICES["batch_norm"] = chosen


def finite_programs(case: Case) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the forms of the check of all tensors."""
    images = jnp.ones((case.batch, case.side, case.side, 3))
    shapes = jax.eval_shape(case.model.init, jax.random.key(0), images[:1])
    tensors = (images, *(jnp.ones(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)))
    for name, form in FINITE.items():
        yield name, jax.jit(form), tensors


def step_time(case: Case, rounds: int, seconds: float) -> tuple[float, float]:
    """Return the milliseconds of the whole step with the present choices, and its temporary memory in MiB."""
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.001))
    create = functools.partial(
        create_train_state, model=case.model, optimizer=optimizer, image_shape=(case.side, case.side, 3)
    )
    view = Augmentation(mean=(0.5,) * 3, std=(0.25,) * 3, pad=PAD, flip=True)
    random = np.random.default_rng(0)
    batch = jax.device_put({
        "image": random.integers(0, 256, (case.batch, case.side, case.side, 3), np.uint8),
        "label": random.integers(0, 10, case.batch).astype(np.int32),
    })  # fmt: skip
    key = jax.device_put(jax.random.key(0))

    def step(state: Any, batch: Any, key: jax.Array) -> Any:  # new for each call: jax.jit caches traces by function
        return train_step(state, batch, key, augment=functools.partial(augment, options=view))

    state = jax.jit(create)(key)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()

    def once() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch, key)
        return metrics

    return milliseconds(once, rounds, seconds), temporary(compiled)


def milliseconds(once: Callable[[], Any], rounds: int, seconds: float) -> float:
    """Return the least mean time of a call over several rounds, each of calls in a row."""
    jax.block_until_ready(once())
    start = time.perf_counter()
    jax.block_until_ready(once())
    calls = max(1, round(seconds / max(1e-6, time.perf_counter() - start)))
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = once()
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / calls * 1e3)
    return min(means)


def temporary(compiled: jax.stages.Compiled) -> float:
    """Return the temporary memory of a program in MiB."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes / 2**20 if memory else float("nan")


def row(*cells: Any) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(f'{c:.3f}' if isinstance(c, float) else str(c) for c in cells)} |", flush=True)


def run_part(part: str, name: str, case: Case, options: argparse.Namespace) -> None:
    """Print the rows of the forms of one operation."""
    programs = {"crop": crop_programs, "pool": pool_programs, "norm": norm_programs, "finite": finite_programs}
    empty = jax.jit(lambda *arguments: jnp.zeros(()), keep_unused=True)
    for i, (form, program, arguments) in enumerate(programs[part](case)):
        if i == 0:
            call = empty.lower(*arguments).compile()
            floor = milliseconds(lambda a=arguments, c=call: c(*a), options.rounds, options.seconds)  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
            row(name, part, "call", floor, 0.0)
        compiled = program.lower(*arguments).compile()
        time_ms = milliseconds(lambda a=arguments, c=compiled: c(*a), options.rounds, options.seconds)  # type: ignore[misc]  # likewise
        row(name, part, form, time_ms, temporary(compiled))


def run_steps(name: str, case: Case, options: argparse.Namespace) -> None:
    """Print the rows of the whole step."""
    chosen = dict(CHOICES)
    platform = {"cpu": "cpu", "tpu": "tpu"}.get(jax.default_backend(), "gpu")
    if options.step:
        variants = [dict(pair.split("=") for pair in text.split(",")) for text in options.step]
    else:
        variants = [
            {operation: form}
            for operation, forms in STEP_FORMS.items()
            if case.batch_norm or operation != "batch_norm"
            for form in forms
            if form != getattr(CHOICES[operation], platform)
        ]
        variants += [{"batch_norm": "before"}] * case.batch_norm
    for variant in ({}, *variants):
        for operation, form in variant.items():
            if form == "before":
                vars(normalization)["normalize_by_batch"] = before
            else:
                CHOICES[operation] = CHOICES[operation]._replace(**{platform: form})
        label = ", ".join(f"{operation} {form}" for operation, form in variant.items()) or "as chosen"
        row(name, "step", label, *step_time(case, options.rounds, options.seconds))
        CHOICES.update(chosen)
        vars(normalization)["normalize_by_batch"] = normalize_by_batch


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["vgg16:224:128", "vgg16_bn:32:512"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--step", nargs="*", default=[], metavar="OPERATION=FORM,...")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round (%(default)s)")
    options = parser.parse_args(arguments)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {options.dtype}\n")
    row("case", "part", "form", "ms", "temporary MiB")
    row(*("---",) * 5)
    for name in options.cases:
        case = parse_case(name, options.dtype)
        for part in options.parts:
            if part == "step":
                run_steps(name, case, options)
            elif part != "norm" or case.batch_norm:
                run_part(part, name, case, options)


if __name__ == "__main__":
    main()
