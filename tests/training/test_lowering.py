"""What GPUs and TPUs get: the text of the training step of the shipped configs, lowered but not compiled."""

import dataclasses
import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import variants
from benchmarks.scaling import collectives, compile_step
from tests.narrow import NARROW_TABLE
from vgg_jax.data.augmentation import augment
from vgg_jax.model import TABLE_1
from vgg_jax.ops import forms, normalization
from vgg_jax.training.inputs import augmentation
from vgg_jax.training.optimizer import make_optimizer, make_schedule
from vgg_jax.training.sharding import AXIS, state_shardings, with_sharded_head
from vgg_jax.training.state import create_train_state
from vgg_jax.training.step import train_step
from vgg_jax.training.validation import create_model

CONFIGS, PLATFORMS = ("vgg16", "imagenet"), ("cuda", "tpu")
CELLS = [(config, platform, False) for config in CONFIGS for platform in PLATFORMS] + [("imagenet", "cuda", True)]
every_cell = pytest.mark.parametrize(("name", "platform", "shard_head"), CELLS)


@functools.cache
def lowered(name, platform, shard_head):
    """Return the text of the step of a config in bfloat16, the leaves of its state and the shape of the images.

    With `shard_head`, the step is that of 8 devices.
    """
    config = importlib.import_module(f"configs.{name}").get_config()
    classes = config.model.num_classes or 10
    config.model = dataclasses.replace(config.model, dtype="bfloat16", num_classes=classes)
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    model, side = create_model(config.model, mesh.size), config.data.image_size
    if shard_head:
        model = with_sharded_head(model, mesh)
    optimizer = make_optimizer(config.optimizer, make_schedule(config, 50_000), config.accumulation_steps)
    create = functools.partial(
        create_train_state,
        model=model,
        optimizer=optimizer,
        image_shape=(side, side, 3),
        ema_decay=config.optimizer.ema_decay,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, options = jax.eval_shape(create, key), {}
    shape = (config.batch_size, side, side, 3)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32)}
    if shard_head:
        shardings, parts = state_shardings(state, mesh, True), NamedSharding(mesh, P(AXIS))
        options = {"out_shardings": (shardings, NamedSharding(mesh, P())), "in_shardings": (shardings, parts, None)}
    data = dataclasses.replace(config.data, train_view="pad_crop", pad=4)
    view = functools.partial(augment, options=augmentation(data))
    step = jax.jit(functools.partial(train_step, augment=view), donate_argnums=0, **options)
    text = step.trace(state, batch, key).lower(lowering_platforms=(platform,)).as_text()
    return text, len(jax.tree.leaves(state)), shape


@every_cell
def test_accelerators_get_no_maps_in_rows(name, platform, shard_head):
    """No array has an axis of width times channels."""
    text, _, (_, side, _, _) = lowered(name, platform, shard_head)
    widths = {side // 2**i * width for i, stage in enumerate(TABLE_1["D"]) for width in stage if side // 2**i > 1}
    assert [width for width in widths if re.search(rf"\D{width}x(f32|bf16)>", text)] == []


@every_cell
def test_sums_on_accelerators_accumulate_in_float32(name, platform, shard_head):
    text, *_ = lowered(name, platform, shard_head)
    sums = [line for line in text.splitlines() if "stablehlo.reduce(" in line and "applies stablehlo.add" in line]
    assert len(sums) > 30
    assert [line for line in sums if "bf16" in line] == []


@every_cell
def test_accelerators_get_no_workaround_for_cpus(name, platform, shard_head):
    """No barrier, no product of a matrix and zeros for the finite check, no layout constraint, no custom call."""
    text, *_ = lowered(name, platform, shard_head)
    assert "optimization_barrier" not in text
    assert re.findall(r"dot_general.*, tensor<\d+x[a-z]\w+>\) ->", text) == []
    assert re.findall(r"custom_call @\w+", text) == []


@every_cell
def test_every_array_of_the_state_is_donated(name, platform, shard_head):
    text, leaves, _ = lowered(name, platform, shard_head)
    signature = next(line for line in text.splitlines() if "@main(" in line)
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", signature)) == leaves


def batch_norm_tensors(program):
    """Return the shapes in the all-reduces of a program that are neither scalars nor gradients of parameters."""
    outputs = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", " ".join(outputs))]
    return [shape for shape in shapes if len(shape) == 2 and shape[0] <= 2 and shape[1] % 8 == 0]


def compile_small(side, devices=8, **fields):
    fields = dict(num_classes=10, pool_size=1, hidden=()) | fields
    return compile_step(11, 16, devices, False, side, batch_norm=True, **fields).as_text()


def test_batch_norm_sends_two_vectors_once_each_way(narrow, monkeypatch):
    """As on accelerators: for each layer, one all-reduce of 2 C numbers forward, one backward."""
    monkeypatch.setitem(forms.CHOICES, "batch_norm", forms.Choice("maps", "maps", "maps"))
    program = compile_small(32)
    channels = [width for stage in NARROW_TABLE["A"] for width in stage]
    assert sorted(batch_norm_tensors(program)) == sorted([(2, width) for width in channels] * 2)


def test_statistics_of_each_device_send_nothing(narrow, monkeypatch):
    """Only the running statistics are averaged over the devices; the gradients are summed with all others."""
    monkeypatch.setitem(forms.CHOICES, "batch_norm", forms.Choice("maps", "maps", "maps"))
    program = compile_small(32, batch_norm_groups=8)
    assert [shape for shape in batch_norm_tensors(program) if shape[0] == 2] == []


@pytest.mark.slow
def test_batch_norm_sends_a_tenth_of_the_bytes_of_rows(narrow, monkeypatch):
    """At 224x224, against the code that reduced rows and left the gradient to autodiff."""
    sent = {}
    for name, function in (("before", variants.before), ("after", normalization.normalize_by_batch)):
        monkeypatch.setattr(normalization, "normalize_by_batch", function)
        with_batch_norm = sum(size for _, size in collectives(compile_small(224)))
        sent[name] = with_batch_norm - sum(4 * math.prod(shape) for shape in gradient_shapes() for _ in range(1))
    assert 0 < sent["after"] < sent["before"] / 10


def gradient_shapes():
    model = variants.Case(11, True, 32, 1, jnp.float32).model
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return [leaf.shape for leaf in jax.tree.leaves(params)]
