"""The conversion between torchvision's state dicts and our variables."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from tests.conftest import raises_user_error
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG, from_torch, to_torch

SMALL = dict(num_classes=10, pool_size=1, hidden=())


def variables_of(model, channels=3):
    """Return random variables with the shapes of the model's."""
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), images))
    random = np.random.default_rng(0)
    return structure.unflatten([jnp.asarray(random.normal(size=a.shape), a.dtype) for a in leaves])


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_torchvision_weights_round_trip_exactly(dtype, torchvision, narrow, x64, monkeypatch):
    torch.manual_seed(0)
    widths = [part for stage in NARROW_TABLE["A"] for part in (*stage, "M")]
    monkeypatch.setitem(torchvision.models.vgg.cfgs, "A", widths)
    net = torchvision.models.vgg11_bn(weights=None, num_classes=7, init_weights=False)
    net.classifier[0], net.classifier[3] = torch.nn.Linear(64 * 49, 64), torch.nn.Linear(64, 32)
    net.classifier[6] = torch.nn.Linear(32, 7)
    net = net.to(dtype)
    model, variables = from_torch(net.state_dict())
    expected_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    assert model.param_dtype == expected_dtype
    assert model.dtype == jnp.promote_types(expected_dtype, jnp.float32)
    assert {a.dtype for a in jax.tree.leaves(variables["params"])} == {expected_dtype}

    back = to_torch(model, variables)
    state_dict = net.state_dict()
    assert list(back) == list(state_dict)
    for key, tensor in state_dict.items():
        if dtype == torch.bfloat16 and tensor.dtype == torch.bfloat16:
            array = np.asarray(back[key], ml_dtypes.bfloat16).view(np.int16)
            tensor = tensor.view(torch.int16)
        else:
            array = back[key]
        np.testing.assert_array_equal(array, tensor.numpy())
    net.load_state_dict({key: torch.from_numpy(np.asarray(a, np.float32)) for key, a in back.items()})


@pytest.mark.parametrize(
    "model",
    [
        VGG(11, lrn=True, **SMALL),
        VGG(16, conv1x1=True, batch_norm=True, **SMALL),
        VGG(19, batch_norm=True, num_classes=3, hidden=(16,), pool_size=2),
        VGG(13, num_classes=3, hidden=(16, 24), pool_size=3),
    ],
    ids=["A-LRN", "C-BN", "E-BN", "B"],
)
def test_network_is_read_off_the_names(model, narrow):
    variables = variables_of(model, channels=4)
    read, back = from_torch(to_torch(model, variables))
    assert_equal_trees(back, variables)
    for field in ("depth", "batch_norm", "lrn", "conv1x1", "num_classes", "pool_size", "hidden"):
        assert getattr(read, field) == getattr(model, field)


@pytest.mark.parametrize("model", [VGG(11, pool_after=(1, 3), **SMALL), VGG(11, num_classes=None, hidden=(8, 8))])
def test_given_model_is_used(model):
    variables = variables_of(model)
    same, back = from_torch(to_torch(model, variables), model)
    assert same is model
    assert_equal_trees(back, variables)


def test_single_layer_classifier_is_read():
    """Networks for CIFAR often have one layer, called `classifier`."""
    model = VGG(11, **SMALL)
    variables = variables_of(model)
    state_dict = to_torch(model, variables)
    for leaf in ("weight", "bias"):
        state_dict[f"classifier.{leaf}"] = state_dict.pop(f"classifier.0.{leaf}")
    assert_equal_trees(from_torch(state_dict)[1], variables)


def test_unknown_classifiers_are_refused():
    model = VGG(11, **SMALL)
    state_dict = to_torch(model, variables_of(model))
    for leaf in ("weight", "bias"):
        state_dict[f"classifier.fc.{leaf}"] = state_dict.pop(f"classifier.0.{leaf}")
    with raises_user_error("unexpected classifier.fc.weight (10, 512)"):
        from_torch(state_dict)
    deep = {f"classifier.{i}.weight": np.zeros((5, 5), np.float32) for i in (0, 3, 6, 9)}
    with raises_user_error("its classifier is not a VGG's: hidden is (5, 5, 5)"):
        from_torch({"features.0.weight": state_dict["features.0.weight"], **deep})


def test_head_has_torchvision_names():
    def names(model):
        return [name for name in to_torch(model, variables_of(model)) if name.startswith("classifier")]

    assert names(VGG(11, **SMALL)) == ["classifier.0.weight", "classifier.0.bias"]
    assert names(VGG(11, num_classes=2, hidden=(4, 4), pool_size=1))[::2] == [
        f"classifier.{i}.weight" for i in (0, 3, 6)
    ]


def test_all_mismatches_are_listed():
    model = VGG(11, batch_norm=True, **SMALL)
    state_dict = to_torch(model, variables_of(model))
    del state_dict["features.1.running_mean"]
    state_dict["features.99.weight"] = np.zeros((2, 2), np.float32)
    state_dict["features.4.weight"] = state_dict["features.4.weight"].transpose(1, 0, 2, 3)
    with pytest.raises(ValueError, match="does not fit VGG") as caught:
        from_torch(state_dict)
    message = str(caught.value)
    assert "depth=11, batch_norm=True" in message
    assert "missing features.1.running_mean (64,)" in message
    assert "unexpected features.99.weight (2, 2)" in message
    assert "features.4.weight has shape (64, 128, 3, 3), expected (128, 64, 3, 3)" in message
    assert len(message.splitlines()) == 4


def test_weights_of_other_networks_are_refused():
    plain = VGG(16, **SMALL)
    state_dict = to_torch(plain, variables_of(plain))
    with pytest.raises(ValueError, match=r"missing features.1.running_mean"):
        from_torch(state_dict, VGG(16, batch_norm=True, **SMALL))
    with pytest.raises(ValueError, match=r"expected torchvision's or timm's names"):
        from_torch({"conv1.weight": np.zeros((64, 3, 3, 3), np.float32)})


def test_wrong_variables_are_refused():
    model = VGG(11, **SMALL)
    variables = variables_of(model)
    variables["params"]["conv1_1"]["kernel"] = jnp.zeros((3, 3, 3, 63))
    del variables["params"]["fc8"]["bias"]
    variables["params"]["fc9"] = {"bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match="the variables do not fit") as caught:
        to_torch(model, variables)
    message = str(caught.value)
    assert "params/conv1_1/kernel has shape (3, 3, 3, 63), expected (3, 3, 3, 64)" in message
    assert "missing params/fc8/bias" in message
    assert "unexpected params/fc9/bias" in message


def test_float64_weights_need_64_bit_mode():
    model = VGG(11, **SMALL)
    state_dict = {name: a.astype(np.float64) for name, a in to_torch(model, variables_of(model)).items()}
    with pytest.raises(ValueError, match="jax_enable_x64"):
        from_torch(state_dict)
