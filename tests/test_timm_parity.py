"""timm's head of convolutions: the same representation and logits as timm at every image size."""

import jax
import numpy as np
import pytest
import torch

from tests.conftest import raises_user_error, relative_error
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import VGG, from_torch, load, to_torch
from vgg_jax.data.preprocessing import IMAGENET
from vgg_jax.evaluation.protocols import dense_scores
from vgg_jax.training.sharding import make_mesh, with_sharded_head
from vgg_jax.weights.formats import Loaded, save_file

MODEL = VGG(11, num_classes=5, conv_head=True)


@pytest.fixture
def narrow_net(narrow_timm):
    """Return a function that makes timm's VGG-11 with an eighth of the channels, and random biases."""

    def make(**options):
        torch.manual_seed(0)
        net = narrow_timm.create_model("vgg11", **options).eval()
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        return net

    return make


def random_images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def timm_output(net, images):
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def test_logits_equal_timm_at_every_size(narrow_net):
    net = narrow_net(num_classes=5)
    model, variables = from_torch(net.state_dict(), MODEL)
    for height, width in ((160, 160), (224, 224), (256, 256), (288, 288), (64, 256), (300, 200)):
        images = random_images(2, height, width, 3)
        ours = jax.jit(model.apply)(variables, images)
        assert relative_error(ours, timm_output(net, images)) < 1e-5, (height, width)


def test_representations_equal_timm_without_classes(narrow_net):
    net = narrow_net(num_classes=0)
    model, variables = from_torch(net.state_dict(), MODEL.clone(num_classes=None))
    for side in (160, 224, 256, 288):
        images = random_images(1, side, side, 3)
        ours = jax.jit(model.apply)(variables, images)
        assert ours.shape == (1, 4096)
        assert relative_error(ours, timm_output(net, images)) < 1e-5, side


@pytest.mark.parametrize("classes", [3, 0])
def test_conv_head_is_read_off_timm_names(classes, narrow_net, tmp_path, capsys):
    net = narrow_net(num_classes=classes)
    torch.save(net.state_dict(), tmp_path / "timm.pth")
    ours = load(tmp_path / "timm.pth", preprocessing=IMAGENET)
    assert ours.model == VGG(11, num_classes=classes or None, conv_head=True)
    assert "the head is timm's (conv_head=True)" in capsys.readouterr().err
    images = random_images(1, 160, 160, 3)
    assert relative_error(ours(images), timm_output(net, images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_networks_of_full_width_equal_timm(name, timm):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval()
    model, variables = from_torch(net.state_dict())
    for side in (160, 224, 256, 288):
        images = random_images(1, side, side, 3)
        ours = jax.jit(model.apply)(variables, images)
        assert relative_error(ours, timm_output(net, images)) < 1e-5, side


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_conv_head_survives_saving(suffix, timm, tmp_path):
    """Both formats hold timm's names, so timm loads them too."""
    model = VGG(11, num_classes=3, hidden=(16, 24), conv_head=True)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32))
    variables = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    state_dict = to_torch(model, variables)
    assert state_dict["pre_logits.fc1.weight"].shape == (16, 512, 7, 7)
    assert state_dict["pre_logits.fc2.weight"].shape == (24, 16, 1, 1)
    assert state_dict["head.fc.weight"].shape == (3, 24)
    assert not [name for name in state_dict if name.startswith("classifier")]
    path = tmp_path / f"net{suffix}"
    save_file(path, Loaded(model, variables, IMAGENET))
    back = load(path, preprocessing=IMAGENET)
    assert back.model == model
    assert_equal_trees(back.variables, jax.tree.map(jax.numpy.asarray, variables))


def test_timm_loads_what_to_torch_returns(narrow_net):
    net = narrow_net(num_classes=5)
    model, variables = from_torch(net.state_dict(), MODEL)
    back = {name: torch.from_numpy(array) for name, array in to_torch(model, variables).items()}
    narrow_net(num_classes=5).load_state_dict(back)
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor)


def test_dense_evaluation_is_the_conv_head_itself(narrow_net):
    """The last layer is linear, so the mean may be taken before or after it."""
    model, variables = from_torch(narrow_net(num_classes=5).state_dict(), MODEL)
    images = random_images(1, 288, 256, 3)
    scores = dense_scores(model, variables, images)
    assert relative_error(scores, model.apply(variables, images)) < 1e-5


def test_activations_of_conv_head_are_maps(narrow_net):
    from vgg_jax.features import layer_activations

    net = narrow_net(num_classes=5)
    model, variables = from_torch(net.state_dict(), MODEL)
    images = random_images(1, 288, 256, 3)
    found = layer_activations(model, variables, images, ("fc6", "relu7", "global_pool", "fc8"))
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {"fc6": (1, 3, 2, 4096), "relu7": (1, 3, 2, 4096), "global_pool": (1, 4096), "fc8": (1, 5)}
    with torch.no_grad():
        expected = net.pre_logits(net.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    assert relative_error(found["relu7"], expected.numpy().transpose(0, 2, 3, 1)) < 1e-5


def test_sharded_conv_head_gives_the_same_logits(narrow_net):
    model, variables = from_torch(narrow_net(num_classes=5).state_dict(), MODEL)
    images = random_images(2, 256, 256, 3)
    sharded = with_sharded_head(model, make_mesh())
    expected = jax.jit(model.apply)(variables, images)
    assert relative_error(jax.jit(sharded.apply)(variables, images), expected) < 1e-5


@pytest.mark.slow
def test_gradients_of_conv_head_equal_timm(narrow_net):
    net = narrow_net(num_classes=5).double()
    with jax.enable_x64(True):
        model, variables = from_torch(net.state_dict(), MODEL.clone(dtype=np.float64, param_dtype=np.float64))
        images = random_images(1, 256, 256, 3).astype(np.float64)
        ours = jax.jit(jax.grad(lambda v: (model.apply(v, images) ** 2).sum()))(variables)
        (net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())) ** 2).sum().backward()
        theirs = from_torch({name: parameter.grad for name, parameter in net.named_parameters()}, model)[1]
        assert relative_error(ours, theirs) < 1e-9


def test_pretrained_names_keep_torchvisions_head(timm, tmp_path, monkeypatch):
    """timm's repositories hold torchvision's networks, and their names promise torchvision's function."""
    from safetensors.numpy import save_file as save_arrays

    from vgg_jax.weights.download import load_pretrained

    model = VGG(11, num_classes=3, hidden=(8, 8), conv_head=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    save_arrays(to_torch(model, variables), tmp_path / "vgg11.safetensors")
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path))
    assert not load_pretrained("vgg11").model.conv_head


def test_conv_head_without_hidden_layers_is_refused():
    with pytest.raises(ValueError, match="conv_head is timm's head: it needs two hidden widths"):
        VGG(11, hidden=(8,), conv_head=True)
    with pytest.raises(ValueError, match="head_pool is 'mean'; expected 'average' or 'max'"):
        VGG(11, head_pool="mean")


def test_dense_evaluation_refuses_a_maximum_pool(narrow):
    model = VGG(11, num_classes=3, pool_size=1, hidden=(), head_pool="max")
    with raises_user_error("head_pool is 'max'"):
        dense_scores(model, {}, random_images(1, 32, 32, 3))
