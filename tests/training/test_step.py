"""The steps on one device, on eight devices, against `jax.pmap`, and for every platform."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import random_variables, relative_error
from vgg_jax import VGG
from vgg_jax.config import DataConfig, OptimizerConfig
from vgg_jax.data.augmentation import augment
from vgg_jax.training.inputs import augmentation
from vgg_jax.training.memory import run_memory
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import eval_step, evaluate, train_step

# Rounding by another order of summation, after five steps.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
pytestmark = pytest.mark.usefixtures("narrow")
IMAGE_SHAPE = (16, 16, 3)  # with one pool less, so that the last maps are 1x1 as from 32x32


@functools.cache
def make_state(dtype="float32", learning_rate=0.01, **fields):
    small = dict(depth=11, num_classes=10, pool_size=1, hidden=(), pool_after=(1, 2, 3, 4), dropout_rate=0.0)
    fields = small | fields
    model = VGG(**fields, dtype=dtype, param_dtype=dtype)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(learning_rate))
    variables = random_variables(model, *IMAGE_SHAPE)
    return TrainState.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=variables.get("batch_stats", {}), tx=optimizer
    )


def make_batches(steps, size, dtype=np.float32):
    random = np.random.default_rng(0)
    return [
        {
            "image": random.normal(size=(size, *IMAGE_SHAPE)).astype(dtype),
            "label": random.integers(0, 10, size).astype(np.int32),
        }
        for _ in range(steps)
    ]


def train(state, batches, devices, **arguments):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    state = jax.device_put(jax.tree.map(np.array, state), NamedSharding(mesh, P()))  # a copy: the step donates it
    step = jax.jit(functools.partial(train_step, **arguments), donate_argnums=0)
    for batch in batches:
        state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, P("data"))), jax.random.key(1))
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats, "metrics": metrics})


def train_by_pmap(state, batches, devices):
    """Take five steps in which each device has its share, with explicit means over devices."""

    def step(state, batch):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, batch["image"], train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss, updates.get("batch_stats", {})

        gradients, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=lax.pmean(gradients, "devices"), batch_stats=batch_stats)

    pmapped = jax.pmap(step, axis_name="devices", devices=jax.devices()[:devices])
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("devices",)), P("devices"))
    state = jax.tree.map(lambda a: jax.device_put(np.stack([a] * devices), sharding), state)
    for batch in batches:
        state = pmapped(state, jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), batch))
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0))[0], state.params)


def batch_norm_over_devices(dtype, param_dtype, name):
    """Return batch norm of Flax with `lax.pmean` of the mean and the mean square."""

    def apply(x, use_running_average):
        layer = nn.BatchNorm(
            use_running_average,
            momentum=0.9,
            epsilon=1e-5,
            dtype=dtype,
            param_dtype=param_dtype,
            axis_name="devices",
            name=name,
        )
        return layer(x)

    return apply


@pytest.mark.parametrize(
    ("batch_norm", "dtype"),
    [
        pytest.param(False, "float32", id="plain-float32", marks=pytest.mark.slow),
        pytest.param(True, "float64", id="batch_norm-float64"),
        pytest.param(True, "float32", id="batch_norm-float32", marks=pytest.mark.slow),
        pytest.param(False, "float64", id="plain-float64", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one_device_and_pmap(batch_norm, dtype, x64):
    # In float32, rounding flips a ReLU now and then, and batch norm over small maps amplifies each flip with each step:
    # to 2e-4 after five steps at a rate of 0.01. The tight comparison is the one in float64.
    learning_rate = 0.001 if batch_norm and dtype == "float32" else 0.01
    state = make_state(dtype, learning_rate, batch_norm=batch_norm)
    batches = make_batches(5, 16, dtype)
    one, eight = (train(state, batches, devices) for devices in (1, 8))
    assert relative_error(one["params"], state.params) > 20 * TOLERANCE[dtype]  # it has moved
    assert relative_error(eight["params"], one["params"]) < TOLERANCE[dtype]

    model = state.apply_fn.__self__
    model = model.clone(layers=dataclasses.replace(model.layers, norm=batch_norm_over_devices))
    state = state.replace(apply_fn=model.apply)
    assert relative_error(train_by_pmap(state, batches, 8), eight["params"]) < TOLERANCE[dtype]


def test_random_numbers_do_not_depend_on_the_number_of_devices():
    state = make_state(hidden=(32, 32), dropout_rate=0.5)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, *IMAGE_SHAPE), np.uint8)
    batches = [{"image": x, "label": np.arange(16, dtype=np.int32) % 10} for x in images]
    view = functools.partial(augment, options=augmentation(DataConfig(color_shift=0.1)))
    one, eight = (train(state, batches, devices, augment=view) for devices in (1, 8))
    assert relative_error(eight["params"], one["params"]) < TOLERANCE["float32"]
    assert eight["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-5)


def test_random_numbers_depend_on_key_and_step():
    state = make_state(hidden=(32, 32), dropout_rate=0.5)
    (batch,) = make_batches(1, 8)
    seen = []

    def view(key, batch):
        seen.append(key)
        noise = jax.random.normal(key, batch["image"].shape)
        return {**batch, "image": 100 * (batch["image"] + noise)}  # so large that the loss moves

    step = jax.jit(functools.partial(train_step, augment=view))
    losses = [
        float(step(s, batch, jax.random.key(seed))[1]["loss"])
        for s, seed in ((state, 0), (state, 0), (state, 1), (state.replace(step=1), 0))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert len(seen) <= 2  # traced, not run: the step is jitted


def test_micro_batches_give_the_update_of_the_whole_batch(x64):
    """Parameters, momentum and moving average agree after two updates of four micro-batches each, without dropout."""
    states = {}
    for parts in (1, 4):
        start = make_state("float64")
        config = OptimizerConfig(clip_norm=0.1, nesterov=True)  # the norm of the mean gradient is three times as large
        state = TrainState.create(
            apply_fn=start.apply_fn,
            params=start.params,
            batch_stats={},
            tx=make_optimizer(config, lambda update: 0.01 / (1 + update), parts),  # the schedule counts updates
            ema={"params": start.params, "batch_stats": {}},
            ema_decay=0.999,  # so large that the rising bound is in effect
        )
        step = jax.jit(train_step)
        for batch in make_batches(2, 8, "float64"):
            size = 8 // parts
            for i in range(parts):
                part = {name: array[i * size : (i + 1) * size] for name, array in batch.items()}
                before, (state, _) = state, step(state, part, jax.random.key(0))
                if i < parts - 1:
                    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
                    jax.tree.map(np.testing.assert_array_equal, state.ema, before.ema)
        states[parts] = state
    one, four = states[1], states[4]
    assert relative_error(one.params, start.params) > 1e-6
    assert relative_error(four.params, one.params) < 1e-12
    assert relative_error(four.ema, one.ema) < 1e-12
    assert relative_error(four.opt_state.inner_opt_state, one.opt_state) < 1e-12


def scaling_network(variables, images, train, mutable=False, **_):
    """Return the images times `scale` as logits, and count the steps in the statistics."""
    logits = images * variables["params"]["scale"]
    return (logits, {"batch_stats": {"steps": variables["batch_stats"]["steps"] + 1}}) if mutable else logits


def test_moving_averages_equal_numpy_and_are_evaluated():
    start = {"params": {"scale": np.float32(1)}, "batch_stats": {"steps": np.float32(0)}}
    state = TrainState.create(
        apply_fn=scaling_network,
        params=start["params"],
        batch_stats=start["batch_stats"],
        tx=optax.sgd(0.5),
        ema=start,
        ema_decay=0.3,
    )
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    batch = {"image": logits, "label": np.arange(4), "weight": np.ones(4, np.float32)}
    expected = {"scale": 1.0, "steps": 0.0}
    for step in range(1, 11):
        state, _ = jax.jit(train_step)(state, batch, jax.random.key(0))
        decay = min(0.3, (1 + step) / (10 + step))  # the bound is in effect at steps 1 and 2
        for name, value in (("scale", state.params["scale"]), ("steps", state.batch_stats["steps"])):
            expected[name] = decay * expected[name] + (1 - decay) * float(value)
    assert float(state.ema["params"]["scale"]) == pytest.approx(expected["scale"], rel=1e-6)
    assert float(state.ema["batch_stats"]["steps"]) == pytest.approx(expected["steps"], rel=1e-6)
    assert abs(expected["scale"] / float(state.params["scale"]) - 1) > 1e-3

    scores = logits * expected["scale"]
    losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(4), np.arange(4)]
    assert float(eval_step(state, batch)["loss"]) == pytest.approx(losses.sum(), rel=1e-5)


def test_flip_evaluation_averages_the_logits():
    def network(variables, images, train):
        return images.reshape(len(images), -1)  # left and right pixels belong to different classes

    state = TrainState.create(apply_fn=network, params={}, batch_stats={}, tx=optax.identity())
    images = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
    batch = {"image": images, "label": np.arange(6) % 4, "weight": np.ones(6, np.float32)}
    averaged = {**batch, "image": (images + images[:, :, ::-1]) / 2}
    flipped, expected, plain = (
        float(eval_step(state, b, flip=flip)["loss"]) for b, flip in ((batch, True), (averaged, False), (batch, False))
    )
    assert flipped == pytest.approx(expected, rel=1e-6)
    assert abs(plain / expected - 1) > 1e-3


def test_run_memory_covers_state_batch_and_temporaries():
    """The memory of a step covers the state, the batch and temporary arrays such as the map of the first layer."""
    state, (batch,) = make_state(), make_batches(1, 16)
    step = jax.jit(train_step, donate_argnums=0).lower(state, batch, jax.random.key(0)).compile()
    small, large = (
        jax.jit(eval_step).lower(state, {**make_batches(1, n)[0], "weight": np.ones(n, np.float32)}).compile()
        for n in (16, 128)
    )
    memory = run_memory(step, small, state)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
    lasting = memory["peak"] - memory["temporary"]
    assert state_bytes + batch["image"].nbytes <= lasting < state_bytes + batch["image"].nbytes + 4096
    assert memory["temporary"] > 16 * 16 * 16 * 8 * 4
    assert run_memory(step, large, state)["evaluation"] > 1.5 * memory["evaluation"]


def test_evaluation_ignores_padding_of_weight_zero():
    """Sums over a padded last batch equal those of NumPy over the real examples."""
    state = make_state()
    (batch,) = make_batches(1, 10)
    logits = np.asarray(state.apply_fn({"params": state.params}, batch["image"]), np.float64)
    batch["label"][:] = np.where(np.arange(10) % 2, logits.argmax(1), batch["label"])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), batch["label"]]
    correct = logits.argmax(1) == batch["label"]
    padded = [
        {key: a[:6] for key, a in batch.items()} | {"weight": np.ones(6, np.float32)},
        {key: a[[6, 7, 8, 9, 0, 0]] for key, a in batch.items()} | {"weight": np.float32([1, 1, 1, 1, 0, 0])},
    ]
    result = evaluate(jax.jit(functools.partial(eval_step, state)), padded)
    assert result["count"] == 10
    assert result["accuracy"] == pytest.approx(correct.mean(), abs=1e-7)
    assert 0.5 <= result["accuracy"] < 1.0
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_training_step_exports_for_every_platform():
    state = jax.eval_shape(functools.partial(make_state, batch_norm=True))
    batch = jax.eval_shape(lambda: make_batches(1, 8)[0])
    key = jax.eval_shape(lambda: jax.random.key(0))
    exported = jax.export.export(jax.jit(train_step), platforms=("cpu", "cuda", "tpu"))(state, batch, key)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert len(exported.out_avals) == len(jax.tree.leaves(state)) + 3  # loss, accuracy, finite


def test_step_of_a_plain_network_returns_scalars():
    """The state of a plain network has no statistics; the step returns scalars and the finite flags."""
    state = make_state()
    assert state.batch_stats == {}
    new_state, metrics = jax.jit(train_step)(state, make_batches(1, 4)[0], jax.random.key(0))
    assert int(new_state.step) == 1
    tensors = 2 + len(jax.tree.leaves(state.params))
    assert {name: value.shape for name, value in metrics.items()} == {"loss": (), "accuracy": (), "finite": (tensors,)}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_hot_soft_labels_equal_integer_labels(label_smoothing):
    """An augmentation may replace labels (N,) by probabilities (N, K)."""
    state, (batch,) = make_state(), make_batches(1, 8)

    def soften(key, batch):
        return {**batch, "label": jax.nn.one_hot(batch["label"], 10)}

    results = [
        jax.jit(functools.partial(train_step, label_smoothing=label_smoothing, **arguments))(
            state, batch, jax.random.key(0)
        )
        for arguments in ({}, {"augment": soften})
    ]
    (hard_state, hard), (soft_state, soft) = results
    assert float(soft["loss"]) == pytest.approx(float(hard["loss"]), rel=1e-6)
    assert float(soft["accuracy"]) == float(hard["accuracy"])
    assert relative_error(soft_state.params, hard_state.params) < 1e-6
