"""SGD and the schedules against PyTorch's own, over 50 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.conftest import relative_error
from vgg_jax.config import OptimizerConfig
from vgg_jax.optimizer import make_optimizer, make_schedule

STEPS_PER_EPOCH, STEPS = 5, 50


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 3.0])
@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_steps_equal_pytorchs(schedule, clip_norm, nesterov, x64):
    """A quadratic with noise: parameters after every step and learning rates."""
    config = OptimizerConfig(
        learning_rate=0.05,
        schedule=schedule,
        step_epochs=(4, 7),
        step_factor=0.1,
        clip_norm=clip_norm,
        nesterov=nesterov,
    )
    rate = make_schedule(config, STEPS_PER_EPOCH, STEPS)
    optimizer = make_optimizer(config, rate)
    random = np.random.default_rng(0)
    start, targets = random.normal(size=7), random.normal(size=(STEPS, 7))

    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.SGD([weights], lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(reference, factor=1.0),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(reference, [20, 35], gamma=0.1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(reference, STEPS),
    }[schedule]()

    params = jnp.asarray(start)
    state = optimizer.init(params)
    for step, target in enumerate(targets):
        # PyTorch's rates are float64 recursions, optax's closed forms.
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
        # torch's clip divides by norm + 1e-6.
        assert relative_error(params, weights.detach().numpy()) < (1e-5 if clip_norm else 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_adam_equals_pytorchs(weight_decay, x64):
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


def test_warm_up_rises_linearly_then_the_schedule_starts():
    config = OptimizerConfig(learning_rate=0.8, warmup_epochs=2, schedule="cosine")
    rate = make_schedule(config, STEPS_PER_EPOCH, STEPS)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 0.4, 0.8], atol=1e-7)
    np.testing.assert_allclose([rate(30), rate(STEPS)], [0.4, 0.0], atol=1e-7)


def test_step_epochs_count_from_the_start_with_warm_up_too():
    config = OptimizerConfig(learning_rate=1.0, warmup_epochs=1, schedule="step", step_epochs=(3,), step_factor=0.1)
    rate = make_schedule(config, STEPS_PER_EPOCH, STEPS)
    np.testing.assert_allclose([rate(14), rate(15)], [1.0, 0.1], rtol=1e-6)
