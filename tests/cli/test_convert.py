"""`python -m vgg_jax convert`."""

import torch

from tests.conftest import raises_user_error
from tests.weights.test_layouts import variables_of
from vgg_jax import VGG, load
from vgg_jax.cli.convert import convert
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.weights.formats import Loaded, save_file

SMALL = dict(depth=11, num_classes=3, pool_size=1, hidden=(8, 8))


def test_pth_drops_the_preprocessing_with_a_note(tmp_path, torchvision, capsys):
    model = VGG(**SMALL)
    own = Preprocessing(32, 32, (0.5,), (0.25,), "L")
    save_file(tmp_path / "a.safetensors", Loaded(model, variables_of(model, channels=1), own))
    with raises_user_error("missing, the folder of b.pth, does not exist"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "missing" / "b.pth"), check=False)
    assert convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), check=False) == 0
    assert "note: a .pth file cannot hold the preprocessing Preprocessing(resize=32" in capsys.readouterr().out
    net = load(tmp_path / "a.safetensors")
    net.checked_preprocessing()
    assert net.preprocessing == own
    with raises_user_error("b.pth takes images of 1 channel(s), and its preprocessing gives 3"):
        load(tmp_path / "b.pth").checked_preprocessing()
    with raises_user_error("another head, column, pools or channels"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth"), check=True)


def test_converted_weights_match_torchvision(tmp_path, torchvision, capsys):
    torch.manual_seed(0)
    net = torchvision.models.vgg11_bn(weights=None, num_classes=6, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert convert(str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), check=True) == 0
    output = capsys.readouterr().out
    assert "VGG-11 with batch norm, 6 classes" in output
    assert "relative error" in output
    assert convert(str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth"), check=False) == 0
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(back[name], tensor), name
    with raises_user_error("is the source itself"):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "a.pth"), check=False)
    with raises_user_error("nowhere.pth does not exist"):
        convert(str(tmp_path / "nowhere.pth"), str(tmp_path / "a.pth"), check=False)
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["features.0.bias"], back["features.0.bias"])
