"""`python -m vgg_jax explain`."""

import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, random_variables
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG, Network
from vgg_jax.cli import explain as command
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.features import picture

CLASSES = ("crane", "tench", "crane", "white shark", "night owl, the bird of a name that is too long for one line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a network and an image."""
    folder = tmp_path_factory.mktemp("explain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        model = VGG(11, num_classes=5, pool_size=1, hidden=())
        variables = random_variables(model, 32, 32, 3)
        Network(model, variables, Preprocessing(60, 56), CLASSES).save(folder / "net.safetensors")
    photographs(1)[0].save(folder / "image.png")
    return folder


@pytest.fixture
def run(folder, narrow, monkeypatch, capsys):
    """Return a function that runs the command; it returns the exit code and the lines of standard error."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        code = command.main(["image.png", "--out", "out.png", "--weights", "net.safetensors", *arguments])
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("method", command.CAPTIONS)
def test_picture_has_the_image_and_the_explanation(method, run, folder):
    """Every method writes two panels of the same size. The left one is the network's view."""
    assert run("--method", method, "--class", "3") == (0, [])
    with PIL.Image.open(folder / "out.png") as out, PIL.Image.open(folder / "image.png") as image:
        view = Preprocessing(60, 56).to_image(Preprocessing(60, 56)(image)).resize((320, 320), 3)
        top = picture.FONT_SIZE + 2 * picture.MARGIN
        panels = [np.asarray(out.crop((left, top, left + 320, top + 320)), int) for left in (12, 344)]
        assert out.size == (676, 400)
    np.testing.assert_array_equal(panels[0], np.asarray(view))
    assert np.abs(panels[1] - panels[0]).mean() > 5


def test_title_names_the_predicted_class(run, monkeypatch):
    titles = []
    monkeypatch.setattr(picture, "_shortened", lambda text, font, width: titles.append(text) or text)
    run("--method", "guided")
    run("--method", "guided", "--class", "WHITE shark")
    assert titles[0].endswith("%), predicted")
    assert titles[3].startswith("white shark (") and "%); predicted: " in titles[3]
    assert titles[1:3] == ["the network's view", "guided backpropagation"]


def test_map_is_drawn_where_it_is_large():
    """A map with one large value brightens its corner of a gray image and darkens the others."""
    pixels = np.full((64, 64, 3), 100, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 2
    out = np.asarray(picture.heat_overlay(pixels, heat)).astype(int).sum(-1)
    assert out[2, 61] > 400 > 300 > out[60, 3]
    signed = np.asarray(picture.signed_overlay(pixels, np.eye(64) - np.eye(64)[::-1])).astype(int)
    assert signed[0, 0, 0] > signed[0, 0, 2] + 50
    assert signed[0, 63, 2] > signed[0, 63, 0] + 50
    assert (signed[0, 30] == 100).all()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--class", "crane"], "classes 0, 2 are called 'crane'; expected one: pass its number"),
        (["--class", "white sharc"], "expected the name or number of a class, for example white shark"),
        (["--class", "5"], "--class is 5; expected 0 to 4"),
        (["--layer", "fc8"], "--layer is fc8; expected one of conv1_1"),
        (["--layer", "relu1_1", "--method", "guided"], "expected --method grad-cam with it, not guided"),
        (["--out", "out.abc"], "out.abc ends in '.abc'; expected an image's suffix"),
        (["--out", "no/out.png"], "no, the folder of no/out.png, does not exist; create it first"),
        (["--features-only"], "holds features only; expected a network with classes"),
    ],
)
def test_mistakes_are_refused(arguments, part, run, folder):
    (folder / "out.png").unlink(missing_ok=True)
    code, (line,) = run(*arguments)
    assert code == 2
    assert part in line
    assert not (folder / "out.png").exists()


def test_missing_image_is_refused_before_the_weights_load(run, capsys):
    assert command.main(["missing.png", "--out", "out.png", "--weights", "missing.safetensors"]) == 2
    assert "missing.png is not a file; expected an image" in capsys.readouterr().err


def test_default_layer_has_a_map_worth_drawing():
    """The last ReLU for 224x224 pixels, the last with 8x8 positions for CIFAR-10, the first for tiny images."""
    net = Network(VGG(16), {}, None)
    assert [command.default_layer(net, side) for side in (224, 112, 111, 32, 4)] == [
        "relu5_3", "relu5_3", "relu4_3", "relu3_3", "relu1_1"
    ]  # fmt: skip
