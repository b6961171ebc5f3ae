"""SGD, Adam and the schedules against PyTorch over 50 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.conftest import relative_error
from vgg_jax.config import Config, OptimizerConfig
from vgg_jax.training.optimizer import make_optimizer, make_plateau, make_schedule
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step

STEPS_PER_EPOCH, STEPS = 5, 50


def schedule_of(config):
    """Return the schedule of ten epochs with five updates each."""
    return make_schedule(Config(optimizer=config, batch_size=20, num_epochs=STEPS / STEPS_PER_EPOCH), 119)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 3.0])
@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "linear"])
def test_sgd_steps_equal_pytorch(schedule, clip_norm, nesterov, x64):
    """A noisy quadratic function: parameters and learning rates after every step."""
    config = OptimizerConfig(
        learning_rate=0.05,
        schedule=schedule,
        step_epochs=(4, 7),
        step_factor=0.1,
        clip_norm=clip_norm,
        nesterov=nesterov,
    )
    rate = schedule_of(config)
    optimizer = make_optimizer(config, rate)
    random = np.random.default_rng(0)
    start, targets = random.normal(size=7), random.normal(size=(STEPS, 7))

    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.SGD([weights], lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(reference, factor=1.0),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(reference, [20, 35], gamma=0.1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(reference, STEPS),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(reference, 1.0, 0.0, STEPS),
    }[schedule]()

    params = jnp.asarray(start)
    state = optimizer.init(params)
    for step, target in enumerate(targets):
        # PyTorch computes rates by recursion in float64, optax by closed forms in float32.
        assert float(rate(step)) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        gradient = jax.grad(lambda w, target=target: ((w - target) ** 2).sum())(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)

        reference.zero_grad()
        ((weights - torch.from_numpy(target)) ** 2).sum().backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([weights], clip_norm)
        reference.step()
        scheduler.step()
        # PyTorch clips by norm + 1e-6.
        assert relative_error(params, weights.detach().numpy()) < (1e-5 if clip_norm else 1e-6)


def test_decay_of_kernels_equals_pytorch_parameter_groups(x64):
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.1, decayed="kernels")
    optimizer = make_optimizer(config, optax.constant_schedule(0.05))
    random = np.random.default_rng(0)
    shapes = {"conv1_1": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "bn1_1": {"scale": (4,), "bias": (4,)}}
    shapes["fc8"] = {"kernel": (4, 3), "bias": (3,)}
    params = {layer: {name: random.normal(size=shape) for name, shape in s.items()} for layer, s in shapes.items()}
    tensors = {
        (layer, name): torch.nn.Parameter(torch.from_numpy(a.copy()))
        for layer, p in params.items()
        for name, a in p.items()
    }
    decayed = [tensor for (_, name), tensor in tensors.items() if name == "kernel"]
    others = [tensor for (_, name), tensor in tensors.items() if name != "kernel"]
    reference = torch.optim.SGD(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.05, momentum=0.9, weight_decay=0.1
    )
    state = optimizer.init(params)
    for _ in range(STEPS):
        gradients = jax.tree.map(lambda a: random.normal(size=a.shape), params)
        for (layer, name), tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[layer][name])
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.step()
    for (layer, name), tensor in tensors.items():
        assert relative_error(params[layer][name], tensor.detach().numpy()) < 1e-6  # the rate is float32


def test_rate_scales_with_batch_and_schedule_keeps_epochs():
    """Twice the batch means half the steps per epoch and twice the rate (linear scaling rule), in the same epochs."""
    recipe = OptimizerConfig(
        learning_rate=0.1, reference_batch_size=100, schedule="step", step_epochs=(2,), warmup_epochs=1
    )
    for batch_size, steps_per_epoch, peak in ((50, 20, 0.05), (100, 10, 0.1), (200, 5, 0.2)):
        config = Config(optimizer=recipe, batch_size=batch_size, num_epochs=3)
        assert config.steps_per_epoch(1049) == steps_per_epoch
        assert config.num_steps(1049) == 3 * steps_per_epoch
        rate = make_schedule(config, 1049)
        rates = [float(rate(round(epoch * steps_per_epoch))) for epoch in (0, 0.6, 1, 2)]
        np.testing.assert_allclose(rates, [0, 0.6 * peak, peak, 0.1 * peak], rtol=1e-6)
    recipe.reference_batch_size = 0
    assert Config(optimizer=recipe, batch_size=200).learning_rate == 0.1


def test_gradient_accumulation_keeps_rates_of_updates():
    recipe = OptimizerConfig(learning_rate=0.1, schedule="cosine", warmup_epochs=1)
    whole, parts = (Config(optimizer=recipe, batch_size=100, num_epochs=3, accumulation_steps=n) for n in (1, 4))
    assert (parts.step_size, parts.steps_per_epoch(1049), parts.num_steps(1049)) == (25, 40, 120)
    rates = [[float(make_schedule(config, 1049)(update)) for update in range(30)] for config in (whole, parts)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_adam_equals_pytorch(weight_decay, x64):
    config = OptimizerConfig(name="adam", weight_decay=weight_decay)
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3))
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=7), random.normal(size=(STEPS, 7))
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.Adam([weights], lr=1e-3, weight_decay=weight_decay)
    params = jnp.asarray(start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        weights.grad = torch.from_numpy(gradient)
        reference.step()
        assert relative_error(params, weights.detach().numpy()) < 1e-6


def test_warmup_rises_linearly_before_the_schedule():
    config = OptimizerConfig(learning_rate=0.8, warmup_epochs=2, schedule="cosine")
    rate = schedule_of(config)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 0.4, 0.8], atol=1e-7)
    np.testing.assert_allclose([rate(30), rate(STEPS)], [0.4, 0.0], atol=1e-7)


def test_step_epochs_include_the_warmup():
    config = OptimizerConfig(learning_rate=1.0, warmup_epochs=1, schedule="step", step_epochs=(3,), step_factor=0.1)
    rate = schedule_of(config)
    np.testing.assert_allclose([rate(14), rate(15)], [1.0, 0.1], rtol=1e-6)


def test_plateau_reduces_rate_when_accuracy_stops_improving():
    """Accuracies and the scale after each, worked out by hand for patience 2 and at most three reductions."""
    plateau = make_plateau(OptimizerConfig(schedule="plateau", plateau_patience=2))
    state = plateau.init(jnp.zeros(()))
    update = jax.jit(lambda state, value: plateau.update({}, state, value=value)[1])
    sequence = [
        *((0.50, 1.0), (0.60, 1.0), (0.60, 1.0), (0.59, 0.1)),  # an equal accuracy is no improvement; two without
        *((0.61, 0.1), (0.60, 0.1), (0.62, 0.1), (0.61, 0.1), (0.61, 0.01)),  # an improvement restarts the count
        *((0.10, 0.01), (0.20, 0.001), (0.20, 0.001), (0.20, 0.001), (0.20, 0.001)),  # no fourth reduction
    ]
    for accuracy, scale in sequence:
        state = update(state, 1 - accuracy)
        assert float(state.scale) == pytest.approx(scale, rel=1e-6)
    assert make_plateau(OptimizerConfig()) is None


def test_plateau_steps_equal_pytorch(x64):
    """50 steps with momentum, weight decay and a rate divided by ten after steps 20 and 35."""
    config = OptimizerConfig(learning_rate=0.05, schedule="plateau", plateau_patience=1)
    optimizer, plateau = make_optimizer(config, schedule_of(config)), make_plateau(config)
    random = np.random.default_rng(0)
    start, targets = random.normal(size=7), random.normal(size=(STEPS, 7))
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.SGD([weights], lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(reference, [20, 35], gamma=0.1)
    state = TrainState.create(
        apply_fn=None,
        **dict(params=jnp.asarray(start), tx=optimizer, batch_stats={}, plateau=plateau.init(jnp.zeros(()))),
    )

    @jax.jit
    def advance(state, target, error):
        gradient = jax.grad(lambda w: ((w - target) ** 2).sum())(state.params)
        state = state.apply_gradients(grads=gradient)
        return state.replace(plateau=plateau.update({}, state.plateau, value=error)[1])

    for step, target in enumerate(targets):
        error = 0.5 if step in (19, 34) else 0.4 - 0.001 * step  # worse twice, otherwise always better
        state = advance(state, target, error)
        reference.zero_grad()
        ((weights - torch.from_numpy(target)) ** 2).sum().backward()
        reference.step()
        scheduler.step()
        assert float(0.05 * state.rate_scale) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6)
        assert relative_error(state.params, weights.detach().numpy()) < 1e-6  # the scale is float32


def test_label_smoothing_equals_pytorch():
    logits, labels = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32), np.arange(6)
    state = TrainState.create(
        apply_fn=lambda variables, images, **_: (images * variables["params"]["scale"], {}),
        **dict(params={"scale": jnp.ones(())}, tx=optax.sgd(0.1), batch_stats={}),
    )
    for smoothing in (0.0, 0.1):
        _, metrics = train_step(state, {"image": logits, "label": labels}, jax.random.key(0), label_smoothing=smoothing)
        expected = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing
        )
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-6)
