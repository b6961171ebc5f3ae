"""`python -m vgg_jax convert`."""

import argparse
import dataclasses

import pytest
import torch

from tests.conftest import raises_user_error
from tests.weights.test_layouts import variables_of
from vgg_jax import AUTHORS, CIFAR10, VGG, Network, load
from vgg_jax.cli import network_options
from vgg_jax.cli.convert import convert, main
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.weights.formats import Loaded, save_file

SMALL = dict(depth=11, num_classes=3, pool_size=1, hidden=(8, 8))


def test_pth_keeps_what_the_source_states(tmp_path, torchvision, capsys):
    model = VGG(**SMALL)
    own = Preprocessing(32, 32, (0.5,), (0.25,), "L")
    names = ("cat", "dog", "café au lait")
    save_file(tmp_path / "a.safetensors", Loaded(model, variables_of(model, channels=1), own, names, "sigmoid"))
    with raises_user_error("missing, the folder of b.pth, does not exist"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "missing" / "b.pth"), check=False)
    assert convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), check=False) == 0
    assert capsys.readouterr().err == ""
    for name in ("a.safetensors", "b.pth"):
        net = load(tmp_path / name)
        assert net.checked_preprocessing() == own
        assert (net.model, net.classes, net.outputs) == (model, names, "sigmoid")
    with raises_user_error("another head, column, pools or channels"):
        convert(str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth"), check=True)


@pytest.mark.slow
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


@pytest.mark.usefixtures("narrow")
def test_unknown_facts_are_noted_and_options_state_them(tmp_path, capsys):
    model = VGG(**SMALL)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.pth"
    save_file(source, Loaded(model, variables_of(model)))
    assert main([str(source), str(target)]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert f"note: {target} states no preprocessing, because {source} does not; add --preprocessing" in first
    assert f"note: {target} states no class names, because {source} does not; add --classes FILE" in second
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\ncaf\xc3\xa9\r\n\r\n")  # as Windows writes it
    options = ("--preprocessing", "authors", "--crop", "96", "--resize", "128", "--classes", tmp_path / "names.txt")
    assert main([*map(str, (target, source, *options, "--outputs", "sigmoid"))]) == 0
    assert capsys.readouterr().err == ""
    net = load(source)
    assert net.preprocessing == dataclasses.replace(AUTHORS, resize=128, crop=96)
    assert (net.classes, net.outputs) == (("cat", "dog", "café"), "sigmoid")
    assert main([str(source), str(target), "--features-only"]) == 0
    assert "no head" in capsys.readouterr().out
    assert load(target).model.num_classes is None


@pytest.mark.usefixtures("narrow")
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, capsys):
    model = VGG(**SMALL)
    save_file(tmp_path / "a.safetensors", Loaded(model, variables_of(model)))
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for options, line in (
        ("--mean 123.68,116.779,103.939 --std 1,1,1", "expected that of pixels in [0, 1]: divide the mean and std"),
        ("--mean 0.5 0.5 0.5", "unrecognized arguments"),
        ("--mean=a,b,c", "--mean is 'a,b,c'; expected numbers with commas between them"),
        ("--mean 0.5,0.5,0.5", "found no --std, --resize, --crop: pass all of --mean, --std, --resize and --crop"),
        ("--mean 0.5,0.5,0.5 --std 0.5 --crop 8 --resize 8", "the mean has 3 and the std 1 values"),
        ("--crop 300 --preprocessing imagenet", "the short side is resized to 256; expected at least the crop of 300"),
        (f"--classes {tmp_path}/two.txt", "a.safetensors has 3 classes; found 2 names"),
        (f"--classes {tmp_path}/gap.txt", "gap.txt: line 2 is empty"),
        (f"--classes {tmp_path}/latin.txt", "latin.txt is not in UTF-8"),
        (f"--classes {tmp_path}/none.txt", "none.txt cannot be read: No such file"),
    ):
        command = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), *options.split()]
        if "unrecognized" in line:
            with pytest.raises(SystemExit):
                main(command)
        else:
            assert main(command) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(
    ("stated", "options", "expected"),
    [
        (None, "--mean 0.5,0.4,0.3 --std 0.2,0.3,0.4 --resize 40 --crop 32 --channel-order BGR",
         Preprocessing(40, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "BGR")),
        (None, "--mean 0.5 --std 0.25 --resize 300 --crop 300", Preprocessing(300, 300, (0.5,), (0.25,), "L")),
        (Preprocessing(320, 300), "--crop 310", Preprocessing(320, 310)),
        (Preprocessing(32, 32, (0.5,), (0.25,), "L"), "--mean 0.4", Preprocessing(32, 32, (0.4,), (0.25,), "L")),
        (Preprocessing(32, 32, (0.5,), (0.25,), "L"), "--preprocessing cifar10 --resize 40",
         dataclasses.replace(CIFAR10, resize=40)),
        (AUTHORS, "--no-exif", dataclasses.replace(AUTHORS, exif=False)),
        (AUTHORS, "--channel-order RGB", dataclasses.replace(AUTHORS, channel_order="RGB")),
        (AUTHORS, "", AUTHORS),
    ],
)  # fmt: skip
def test_each_option_replaces_one_field(stated, options, expected, tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    network_options.add_network_options(parser)
    net = Network(VGG(**SMALL), {}, stated)
    monkeypatch.setattr(network_options, "load", lambda source, **_: net)
    assert network_options.load_network("x", parser.parse_args(options.split())).preprocessing == expected
