"""The cost of many devices: python benchmarks/scaling.py [--images-per-second R]

Compiles the training step of VGG-16 at 224x224, global batch 256, for 8 simulated devices, with a replicated and with a
sharded head. Prints the bytes that each device sends in a step and the memory of the state on each device, read from
the compiled programs. Then prints the time of an ImageNet epoch on 1, 8, 64 and 512 accelerators by the formula

  seconds = 1,281,167 / (R * n)  +  1,281,167 / B * bytes(n, B) / bandwidth

R is the images/s of one accelerator, and B = 32 n the global batch. The links are those published for the DGX H200 of
NVIDIA: 900 GB/s of NVLink in both directions together within 8 devices, and 400 Gb/s of InfiniBand for each device
beyond. This assumes no overlap of communication and computation, so it is an upper bound. Takes half a minute on 2
cores.
"""

import argparse
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax import VGG
from vgg_jax.config import OptimizerConfig
from vgg_jax.model import PLAIN
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.sharding import AXIS, make_mesh, state_shardings, with_sharded_head
from vgg_jax.training.state import create_train_state
from vgg_jax.training.step import train_step

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "f64": 8}
KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
IMAGENET = 1_281_167
HEAD_WIDTHS = (4096, 4096, 1000)
HEAD_INPUTS = 512 * 7 * 7


def compile_step(
    depth: int, batch_size: int, devices: int, sharded: bool, side: int = 224, **fields: Any
) -> jax.stages.Compiled:
    """Return the compiled training step of a VGG with images of a side and other fields on a number of devices."""
    mesh = Mesh(make_mesh().devices[:devices], (AXIS,))
    model = VGG(depth, **{"layers": PLAIN} | fields)  # XLA's convolution, as on accelerators; pools send nothing
    if sharded:
        model = with_sharded_head(model, mesh)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.01))
    create = functools.partial(create_train_state, model=model, optimizer=optimizer, image_shape=(side, side, 3))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(create, key)
    shardings = state_shardings(state, mesh, sharded)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = {"image": ((batch_size, side, side, 3), jnp.float32), "label": ((batch_size,), jnp.int32)}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(AXIS)))
        for name, (shape, dtype) in shapes.items()
    }
    step = jax.jit(train_step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0)
    return step.lower(jax.tree.map(placed, state, shardings), batch, key).compile()


def collectives(program: str) -> list[tuple[str, int]]:
    """Return the kind of each collective operation of a compiled program, and the bytes of its output."""
    found = []
    for output, operation in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", program):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", output)
        sizes = [BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in parts]
        found.append((operation, sum(sizes)))
    return found


def ring_bytes(program: str, devices: int) -> float:
    """Return the bytes that each device sends in a compiled program, with each collective on a ring of all devices."""
    factors = {
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "reduce-scatter": devices - 1,  # of its output, which is a shard
        "collective-permute": 1,
    }
    return sum(factors[operation] * size for operation, size in collectives(program))


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of the arguments of a step on each device: state and batch."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes


def predicted_bytes(depth: int, batch_size: int, devices: int, sharded: bool) -> float:
    """Return the result of `ring_bytes` by a formula, in float32.

    With a replicated head, all gradients are summed over the devices. With a sharded head, only the gradients of the
    convolutions are. The inputs of the head are resharded, forward and backward. The outputs of each dense layer are
    summed, and their gradients gathered.
    """
    model = VGG(depth)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    convolutions, head = (
        sum(leaf.size for layer in model.layers_with_parameters((part,)) for leaf in jax.tree.leaves(params[layer]))
        for part in ("features", "head")
    )
    share = (devices - 1) / devices
    if not sharded:
        return 2 * share * 4 * (convolutions + head)
    inputs = 2 * share * 4 * batch_size / devices * HEAD_INPUTS
    outputs = 3 * share * 4 * batch_size * sum(HEAD_WIDTHS)
    return 2 * share * 4 * convolutions + inputs + outputs


def epoch_seconds(images_per_second: float, devices: int, sharded: bool) -> float:
    """Return the seconds of an ImageNet epoch of VGG-16 by the formula above."""
    batch_size = 32 * devices
    bandwidth = 450e9 if devices <= 8 else 50e9  # bytes/s that a device sends
    sending = predicted_bytes(16, batch_size, devices, sharded) / bandwidth if devices > 1 else 0.0
    return IMAGENET / (images_per_second * devices) + IMAGENET / batch_size * sending


def main() -> None:
    """Compile the steps and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-second", type=float, default=4000.0, help="rate of one accelerator (%(default)s)")
    rate = parser.parse_args().images_per_second
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print("| head | sent by each device, MB a step | state and batch on each device, MB |")
    print("|---|---|---|")
    for sharded in (False, True):
        compiled = compile_step(16, 256, 8, sharded)
        moved = ring_bytes(compiled.as_text() or "", 8)
        print(
            f"| {'sharded' if sharded else 'replicated'} | {moved / 1e6:.1f} | {held_bytes(compiled) / 1e6:.1f} |",
            flush=True,
        )
    print("\n| accelerators | global batch | sent, MB a step: replicated, sharded | an epoch: replicated, sharded |")
    print("|---|---|---|---|")
    for devices in (1, 8, 64, 512):
        sent = [predicted_bytes(16, 32 * devices, devices, s) / 1e6 for s in (False, True)]
        seconds = [epoch_seconds(rate, devices, s) for s in (False, True)]
        cells = (
            f"{devices}",
            f"{32 * devices:,}",
            "{:,.0f}, {:,.0f}".format(*sent),
            "{:.1f} s, {:.1f} s".format(*seconds),
        )
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
