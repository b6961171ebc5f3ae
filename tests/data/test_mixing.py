"""Mixup and cutmix equal torchvision's transforms, given the same part, box and permutation."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.data.mixing import Mixing, box_around, cutmix, cutmix_box, mix, mixup, part_outside

N, H, W, K = 6, 12, 20, 5


@pytest.fixture
def v2(torchvision):
    return importlib.import_module("torchvision.transforms.v2")


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(N, H, W, 3)).astype(np.float32), random.integers(0, K, N)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}


def torch_batch(batch):
    return torch.from_numpy(np.array(batch["image"]).transpose(0, 3, 1, 2)), torch.from_numpy(
        np.array(batch["label"])
    ).long()


def soft(labels):
    return jax.nn.one_hot(labels, K)


def test_mixup_equals_torchvision(v2, batch):
    transform = v2.MixUp(num_classes=K)
    for part in (0.0, 0.3, 0.5, 1.0):
        transform.make_params = lambda inputs, part=part: {"lam": part}
        images, labels = transform(*torch_batch(batch))
        ours = np.asarray(mixup(batch["image"], part)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours, images, rtol=0, atol=1e-6)
        np.testing.assert_allclose(mixup(soft(batch["label"]), part), labels, rtol=0, atol=1e-6)


def test_cutmix_equals_torchvision(v2, batch):
    """Boxes drawn by torchvision, given to both."""
    torch.manual_seed(0)
    transform = v2.CutMix(num_classes=K)
    for _ in range(20):
        params = transform.make_params([torch_batch(batch)[0]])
        transform.make_params = lambda inputs, params=params: params
        images, labels = transform(*torch_batch(batch))
        left, top, right, bottom = params["box"]
        box = jnp.array([top, left, bottom, right])
        np.testing.assert_array_equal(np.asarray(cutmix(batch["image"], box)).transpose(0, 3, 1, 2), images)
        kept = part_outside(box, H, W)
        assert float(kept) == pytest.approx(params["lam_adjusted"], abs=1e-6)
        np.testing.assert_allclose(mixup(soft(batch["label"]), kept), labels, rtol=0, atol=1e-6)
        transform = v2.CutMix(num_classes=K)


def test_boxes_equal_torchvision(v2, batch, monkeypatch):
    """The box follows from the part and the center; torchvision's draws are replaced."""
    transform, images = v2.CutMix(num_classes=K), torch_batch(batch)[0]
    random = np.random.default_rng(0)
    for _ in range(200):
        part, row, column = float(np.float32(random.uniform())), int(random.integers(H)), int(random.integers(W))
        draws = iter([torch.tensor([column]), torch.tensor([row])])
        transform._dist = type("Beta", (), {"sample": lambda self, shape, part=part: torch.tensor([part])})()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, draws=draws, **__: next(draws))
            left, top, right, bottom = transform.make_params([images])["box"]
        assert box_around(jnp.array([row, column]), part, H, W).tolist() == [top, left, bottom, right]


@pytest.mark.parametrize(
    "options",
    [
        Mixing(K, mixup=0.4, cutmix=1.0),
        pytest.param(Mixing(K, mixup=0.4), marks=pytest.mark.slow),
        pytest.param(Mixing(K, cutmix=1.0), marks=pytest.mark.slow),
    ],
    ids=["both", "mixup", "cutmix"],
)
def test_mixed_batches_are_consistent(options, batch):
    """Labels sum to 1 and agree with the pixels; the answer is the class with the larger part."""
    ones = {"image": jnp.ones((N, H, W, 1)).at[1::2].set(0.0), "label": jnp.arange(N) % 2}
    options = Mixing(2, options.mixup, options.cutmix)
    kinds, step = set(), jax.jit(lambda key: mix(key, ones, options))
    for seed in range(12):
        mixed = step(jax.random.key(seed))
        labels, pixels = np.asarray(mixed["label"]), np.asarray(mixed["image"])
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(pixels.mean((1, 2, 3)), labels[:, 0], atol=1e-5)
        np.testing.assert_array_equal(mixed["answer"], labels.argmax(1))
        kinds.add(len(np.unique(pixels[0])) > 1)
    assert kinds <= {True, False} and (len(kinds) == 2 or not (options.mixup and options.cutmix))


def test_parts_have_the_beta_distribution():
    """The mean and variance of Beta(alpha, alpha), from labels of many steps."""
    two = {"image": jnp.zeros((2, 2, 2, 1)), "label": jnp.array([[1.0], [0.0]])}
    draw = jax.jit(jax.vmap(lambda key: mix(key, two, Mixing(1, mixup=0.4))["label"][0, 0]))
    parts = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert parts.mean() == pytest.approx(0.5, abs=0.02)
    assert parts.var() == pytest.approx(0.25 / 1.8, rel=0.05)


def test_drawn_boxes_cover_the_expected_part():
    boxes = jax.vmap(lambda key: cutmix_box(key, 0.75, 32, 32))(jax.random.split(jax.random.key(1), 500))
    sides = np.asarray(boxes[:, 2:] - boxes[:, :2])
    assert sides.max() == 16
    assert (np.asarray(boxes) >= 0).all() and (np.asarray(boxes) <= 32).all()


@pytest.mark.slow
def test_mixing_does_not_depend_on_the_devices(batch):
    wide = {name: jnp.concatenate([array] * 4) for name, array in batch.items()}
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.device_put(wide, NamedSharding(mesh, P("data")))
    step = jax.jit(lambda key, batch: mix(key, batch, Mixing(K, mixup=0.4, cutmix=1.0)))
    for seed in range(3):
        one, many = (step(jax.random.key(seed), b) for b in (wide, sharded))
        for name in one:
            np.testing.assert_array_equal(one[name], many[name])
