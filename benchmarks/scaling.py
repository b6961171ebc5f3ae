"""What many devices cost: python benchmarks/scaling.py [--images-per-second R]

Compiles the training step of VGG-16 at 224x224, global batch 256, for 8 simulated devices, with the fully connected
layers whole on each and in parts, and prints the bytes that each device sends in a step and the memory of the state on
each, read off the programs. Then the time of an ImageNet epoch on 1, 8, 64 and 512 accelerators by the formula

  seconds = 1,281,167 / (R * n)  +  1,281,167 / B * bytes(n, B) / bandwidth

for R images/s of one accelerator, a global batch of B = 32 n, links as published for NVIDIA's DGX H200 (900 GB/s of
NVLink both ways together within 8 devices; 400 Gb/s of InfiniBand for each device beyond), and no overlap of computing
and sending: an upper bound. Half a minute on 2 cores.
"""

import argparse
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax import VGG
from vgg_jax.config import OptimizerConfig
from vgg_jax.optimizer import make_optimizer
from vgg_jax.parallel import AXIS, make_mesh, state_shardings, with_sharded_head
from vgg_jax.training import create_train_state, train_step

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "f64": 8}
IMAGENET = 1_281_167
HEAD_WIDTHS = (4096, 4096, 1000)
HEAD_INPUTS = 512 * 7 * 7


def compile_step(depth: int, batch_size: int, devices: int, sharded: bool) -> jax.stages.Compiled:
    """The training step of a plain VGG at 224x224 on so many devices, compiled and not run."""
    mesh = Mesh(make_mesh().devices[:devices], (AXIS,))
    model = VGG(depth, fast=False)  # XLA's convolution, as on accelerators; pools send nothing
    if sharded:
        model = with_sharded_head(model, mesh)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.01))
    create = functools.partial(create_train_state, model=model, optimizer=optimizer, image_shape=(224, 224, 3))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(create, key)
    shardings = state_shardings(state, mesh, sharded)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = {"image": ((batch_size, 224, 224, 3), jnp.float32), "label": ((batch_size,), jnp.int32)}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(AXIS)))
        for name, (shape, dtype) in shapes.items()
    }
    step = jax.jit(train_step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0)
    return step.lower(jax.tree.map(placed, state, shardings), batch, key).compile()


def ring_bytes(program: str, devices: int) -> float:
    """The bytes that each device sends in a compiled program, every collective on a ring of all devices."""
    factors = {
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "reduce-scatter": devices - 1,  # of its output, which is a part
        "collective-permute": 1,
    }
    total = 0.0
    for output, operation in re.findall(rf"= (.*?) ({'|'.join(factors)})(?:-start)?\(", program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", output):
            total += factors[operation] * BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return total


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """The bytes of what a step takes on each device: the state and the batch."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes


def predicted_bytes(depth: int, batch_size: int, devices: int, sharded: bool) -> float:
    """What `ring_bytes` finds, by a formula, in float32.

    Data-parallel, all gradients are summed. With the head in parts those of the convolutions are; the head's inputs
    change hands, forward and backward; and each dense layer's outputs are summed, and their gradients gathered.
    """
    params = jax.eval_shape(lambda: VGG(depth).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    convolutions, head = (
        sum(leaf.size for layer, p in params.items() if layer.startswith(prefix) for leaf in jax.tree.leaves(p))
        for prefix in ("conv", "fc")
    )
    share = (devices - 1) / devices
    if not sharded:
        return 2 * share * 4 * (convolutions + head)
    inputs = 2 * share * 4 * batch_size / devices * HEAD_INPUTS
    outputs = 3 * share * 4 * batch_size * sum(HEAD_WIDTHS)
    return 2 * share * 4 * convolutions + inputs + outputs


def epoch_seconds(images_per_second: float, devices: int, sharded: bool) -> float:
    """The seconds of an ImageNet epoch of VGG-16 by the formula above."""
    batch_size = 32 * devices
    bandwidth = 450e9 if devices <= 8 else 50e9  # bytes/s that a device sends
    sending = predicted_bytes(16, batch_size, devices, sharded) / bandwidth if devices > 1 else 0.0
    return IMAGENET / (images_per_second * devices) + IMAGENET / batch_size * sending


def main() -> None:
    """Compiles, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-second", type=float, default=4000.0, help="of one accelerator (%(default)s)")
    rate = parser.parse_args().images_per_second
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print("| fully connected layers | sent by each device, MB a step | state and batch on each device, MB |")
    print("|---|---|---|")
    for sharded in (False, True):
        compiled = compile_step(16, 256, 8, sharded)
        moved = ring_bytes(compiled.as_text() or "", 8)
        print(
            f"| {'in parts' if sharded else 'whole'} | {moved / 1e6:.1f} | {held_bytes(compiled) / 1e6:.1f} |",
            flush=True,
        )
    print("\n| accelerators | global batch | sent, MB a step: whole, in parts | an epoch: whole, in parts |")
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
