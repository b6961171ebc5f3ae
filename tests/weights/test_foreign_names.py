"""Networks under other people's names: renamed if one reading is left, else refused with the names that do not fit."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch

from tests.conftest import raises_user_error, random_variables
from tests.weights.test_layouts import assert_equal_trees, variables_of
from vgg_jax import VGG, from_torch, load, to_torch
from vgg_jax.cli import predict
from vgg_jax.data.preprocessing import AUTHORS, CIFAR10, IMAGENET
from vgg_jax.weights.formats import Loaded, load_file, save_file
from vgg_jax.weights.imagenet_classes import imagenet_classes, is_imagenets

SMALL = dict(num_classes=10, pool_size=1, hidden=())
HEADED = VGG(16, num_classes=5, pool_size=7, hidden=(12, 9))
FEATURES = VGG(16, num_classes=None, hidden=())


@pytest.fixture(autouse=True)
def narrow_networks(narrow):
    """Give all networks an eighth of their channels."""


def arrays_of(model):
    return {name: array for name, array in to_torch(model, variables_of(model)).items() if array.ndim}


def save(path, arrays):
    """Write arrays in the order that they have, as torch.save does, or as safetensors."""
    if str(path).endswith(".safetensors"):
        safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path)
    return path


def renamed(arrays, names):
    """Return arrays with other modules: `names` maps parts that begin names to others."""
    result = {}
    for name, array in arrays.items():
        old = max((old for old in names if name.startswith(f"{old}.")), key=len, default=None)
        result[name if old is None else names[old] + name[len(old) :]] = array
    return result


def paper_names(model):
    """Return from torchvision's names of a network's convolutions and dense layers to the paper's."""
    layers = [layer for stage in model.stages for layer in stage]
    names = {f"features.{i}": layer.name for i, layer in enumerate(layers) if layer.kind in ("conv", "bn")}
    return names | {f"classifier.{i}": layer.name for i, layer in enumerate(model.head) if layer.kind == "dense"}


def check(loaded, model, arrays, *notes):
    assert loaded.model == model
    assert_equal_trees(loaded.variables, from_torch(arrays, model)[1])
    assert (loaded.preprocessing, loaded.classes) == (None, None)
    for part in notes:
        assert any(part in note for note in loaded.notes), (part, loaded.notes)


# --- heads


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "names",
    [
        ("classifier.1", "classifier.4", "classifier.6"),
        ("classifier.0", "classifier.2", "classifier.4"),
        ("classifier.0", "classifier.3", "classifier.6.0"),
        ("classifier.0", "classifier.3", "classifier.6.1"),
        ("fc1", "fc2", "fc3"),
        ("fc6", "fc7", "fc8"),
        ("fc1", "fc2", "predictions"),
        ("classifier.0", "classifier.3", "head"),
        ("classifier.fc6", "classifier.fc7", "classifier.fc8"),
    ],
    ids=lambda names: "_".join(names),
)
def test_heads_under_other_names_are_renumbered(names, suffix, tmp_path):
    arrays = arrays_of(HEADED)
    theirs = renamed(arrays, dict(zip(("classifier.0", "classifier.3", "classifier.6"), names, strict=True)))
    loaded = load_file(save(tmp_path / f"a.{suffix}", theirs))
    check(loaded, HEADED, arrays, f"its head is {', '.join(names)}: read as classifier.0, classifier.3, classifier.6")


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("classifier.1", "classifier.4"), ("classifier.0", "classifier.2")])
def test_heads_of_two_dense_layers_are_read(names, tmp_path):
    model = VGG(16, num_classes=5, pool_size=7, hidden=(12,))
    arrays = arrays_of(model)
    theirs = renamed(arrays, dict(zip(("classifier.0", "classifier.3"), names, strict=True)))
    check(load_file(save(tmp_path / "a.pth", theirs)), model, arrays, f"its head is {', '.join(names)}")


@pytest.mark.parametrize("name", ["head", "fc", "head.fc", "classifier.1", "classifier"])
def test_single_dense_layers_are_read(name, tmp_path):
    model = VGG(16, **SMALL)
    arrays = arrays_of(model)
    check(load_file(save(tmp_path / "a.pth", renamed(arrays, {"classifier.0": name}))), model, arrays)


@pytest.mark.parametrize("names", [{}, {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}])
def test_convolutional_heads_are_read(names, tmp_path):
    arrays = arrays_of(HEADED)
    theirs = dict(arrays)
    for name in ("classifier.0", "classifier.3", "classifier.6"):
        size = 7 if name == "classifier.0" else 1
        kernel = arrays[f"{name}.weight"]
        theirs[f"{name}.weight"] = kernel.reshape(len(kernel), -1, size, size)
    loaded = load_file(save(tmp_path / "a.pth", renamed(theirs, names)))
    check(loaded, HEADED, arrays, "its head consists of convolutions")


def test_dense_layers_without_room_for_relus_are_refused(tmp_path):
    """Between classifier.0 and classifier.1 there is no ReLU, so that the network is not a VGG."""
    theirs = renamed(arrays_of(HEADED), {"classifier.3": "classifier.1", "classifier.6": "classifier.2"})
    with raises_user_error("6 names do not fit the VGG-16", "classifier.1.weight (9, 12)", "features_only=True"):
        load_file(save(tmp_path / "a.pth", theirs))


@pytest.mark.parametrize("number", ["²", "9" * 5000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_digits_that_are_no_numbers_are_read_as_text(number, suffix, tmp_path):
    """`"²".isdigit()` holds and `int("²")` fails; so does `int` of more than 4300 digits."""
    names = {name: f"{name.rpartition('.')[0]}.{number}{i}" for i, name in enumerate(paper_names(HEADED))}
    arrays = renamed(arrays_of(HEADED), names)
    assert load_file(save(tmp_path / f"net{suffix}", arrays)).model == HEADED


def test_unknown_heads_are_left_out_on_request(tmp_path, capsys):
    arrays = arrays_of(HEADED)
    theirs = renamed(arrays, {"classifier": "decoder"}) | {"decoder.9.gain": np.ones(4, np.float32)}
    path = save(tmp_path / "a.pth", {f"encoder.{name}": array for name, array in theirs.items()})
    with raises_user_error("7 names do not fit the VGG-16 that the others are: decoder.0.weight (12, 3136)"):
        load_file(path)
    features = {name: array for name, array in arrays.items() if name.startswith("features")}
    check(load_file(path, features_only=True), FEATURES, features, "left out decoder.0.weight (12, 3136)")
    net = load(path, features_only=True)
    assert (net.model, net.preprocessing, net.classes) == (FEATURES, None, None)
    printed = capsys.readouterr().err
    assert "removed encoder. from the names" in printed
    assert "left out decoder.0.weight (12, 3136), decoder.0.bias (12,)" in printed


def test_normalization_buffers_are_left_out(tmp_path):
    model = VGG(16, **SMALL)
    arrays = arrays_of(model)
    buffers = {"normalize.mean": np.zeros((1, 3, 1, 1), np.float32), "std": np.ones(3, np.float32)}
    loaded = load_file(save(tmp_path / "a.pth", {**buffers, **arrays}))
    check(loaded, model, arrays, "left out normalize.mean, std, the normalization of its images")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_convolutions_without_bias_get_zeros(batch_norm, tmp_path):
    model = VGG(13, batch_norm=batch_norm, **SMALL)
    arrays = arrays_of(model)
    convolutions = {name.removesuffix(".weight") for name, array in arrays.items() if array.ndim == 4}
    zero = {name: array * (name.removesuffix(".bias") not in convolutions) for name, array in arrays.items()}
    theirs = {name: array for name, array in arrays.items() if name.removesuffix(".bias") not in convolutions}
    check(load_file(save(tmp_path / "a.pth", theirs)), model, zero, "its convolutions have no bias: it is zero here")
    del zero["features.0.bias"]  # one that is missing is a fault of the file
    with raises_user_error("missing features.0.bias"):
        load_file(save(tmp_path / "a.pth", zero))


# --- no last layer


@pytest.mark.parametrize("widths", [(12, 9), (9, 9)])
def test_timm_without_classes_is_a_representation(widths, tmp_path):
    model = VGG(16, num_classes=None, hidden=widths)
    arrays = arrays_of(model)
    theirs = renamed(arrays, {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"})
    for name, size in (("pre_logits.fc1.weight", 7), ("pre_logits.fc2.weight", 1)):
        theirs[name] = theirs[name].reshape(len(theirs[name]), -1, size, size)
    read = load_file(save(tmp_path / "a.safetensors", theirs))
    model = model.clone(conv_head=True)
    check(read, model, arrays, "is taken for fc7: a representation, not classes")
    assert from_torch(theirs)[0] == model
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    assert (np.asarray(model.apply(read.variables, images)) >= 0).all()  # after the ReLU


@pytest.mark.parametrize(
    ("indices", "outputs", "expected"),
    [((0, 3), 12, (None, (12, 12))), ((1, 4), 12, (None, (12, 12))), ((0, 3), 5, (5, (12,)))],
)
def test_square_last_layer_is_a_representation(indices, outputs, expected, tmp_path, capsys):
    """torch's `classifier[:-1]` ends in a square layer at number 3; a layer of other sizes there gives classes."""
    arrays = arrays_of(VGG(16, num_classes=outputs, hidden=(12,)))
    names = {f"classifier.{ours}": f"classifier.{theirs}" for ours, theirs in zip((0, 3), indices, strict=True)}
    read = load_file(save(tmp_path / "a.pth", renamed(arrays, names)))
    assert (read.model.num_classes, read.model.hidden) == expected
    assert any("a representation" in note for note in read.notes) == (expected[0] is None)
    assert from_torch(arrays)[0] == read.model
    assert ("a representation" in capsys.readouterr().err) == (expected[0] is None)


@pytest.mark.parametrize("names", [("fc1", "fc8"), ("classifier.3", "classifier.6"), ("pre_logits.fc1", "head.fc")])
def test_square_layer_that_is_called_last_gives_classes(names, tmp_path):
    model = VGG(16, num_classes=12, hidden=(12,))
    arrays = arrays_of(model)
    theirs = renamed(arrays, dict(zip(("classifier.0", "classifier.3"), names, strict=True)))
    check(load_file(save(tmp_path / "a.pth", theirs)), model, arrays)


# --- truncated networks and features under other names


@pytest.mark.parametrize("final", ["relu4_1", "relu1_1", "relu5_2"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_truncated_networks_are_read(final, batch_norm, tmp_path, capsys):
    model = VGG(16, batch_norm=batch_norm, num_classes=None, hidden=(), final_layer=final)
    arrays = arrays_of(model)
    shallowest = {"relu4_1": 16, "relu1_1": 11, "relu5_2": 16}[final]
    for suffix in ("pth", "safetensors"):
        read = load_file(save(tmp_path / f"a.{suffix}", arrays))
        check(read, model.clone(depth=shallowest), arrays, f"VGG-{shallowest}, the shallowest", f"up to {final}")
    assert from_torch(arrays)[0] == read.model
    assert f"up to {final}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["Gatys", "SSD", "LPIPS", "AdaIN"])
def test_truncated_networks_under_other_names_are_read(kind, suffix, tmp_path):
    model = VGG(16, num_classes=None, hidden=(), final_layer="relu4_1")
    arrays = arrays_of(model)
    names = {"Gatys": paper_names(FEATURES), "SSD": {"features": "vgg"}, "LPIPS": lpips_names(FEATURES), "AdaIN": {}}
    theirs = renamed(arrays, names[kind])
    if kind == "AdaIN":  # bare numbers
        theirs = {name.removeprefix("features."): array for name, array in arrays.items()}
    check(load_file(save(tmp_path / f"a.{suffix}", theirs)), model, arrays, "up to relu4_1")


def test_truncated_networks_are_saved_and_applied(tmp_path, capsys):
    whole = VGG(16, **SMALL)
    variables = variables_of(whole)
    images = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    for final in ("conv4_1", "relu4_1", "pool3"):
        model = VGG(16, num_classes=None, hidden=(), final_layer=final)
        names = [name for name in variables["params"] if name <= ("conv3_3" if final == "pool3" else "conv4_1")]
        part = {"params": {name: variables["params"][name] for name in names}}
        assert_equal_trees(from_torch(to_torch(model, part), model)[1], part)
        maps = model.apply(part, images)
        assert maps.shape == (1, 2, 2, 32 if final == "pool3" else 64)
        expected = whole.clone(pool_after=(1, 2, 3)).apply(variables, images, last_layer=final)
        np.testing.assert_array_equal(maps, expected)
        save_file(tmp_path / "a.safetensors", Loaded(model, part))
        net = load(tmp_path / "a.safetensors")
        assert net.model == model
        assert_equal_trees(net.variables, part)
        net.save(tmp_path / "a.pth")
        assert_equal_trees(load_file(tmp_path / "a.pth").variables, part)
    largest = float(np.abs(maps).max())  # float32 in another order: the error is relative to the largest output
    np.testing.assert_allclose(net(images), maps, rtol=1e-5, atol=1e-6 * largest)
    assert list(net.features(images, "relu2_1")) == ["relu2_1"]
    with raises_user_error("found no layer relu5_1"):
        net.features(images, "relu5_1")
    with pytest.raises(ValueError, match="expected num_classes None"):
        VGG(16, final_layer="relu4_1")
    with pytest.raises(ValueError, match="final_layer is relu4_4; expected one of conv1_1, relu1_1"):
        VGG(16, num_classes=None, hidden=(), final_layer="relu4_4")


def lpips_names(model):
    """Return the names of the package lpips, whose slices keep torchvision's numbers."""
    layers = [layer for stage in model.stages for layer in stage]
    return {f"features.{i}": f"net.slice{layer.name[4]}.{i}" for i, layer in enumerate(layers) if layer.kind == "conv"}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "names",
    [
        paper_names(FEATURES),
        {"features": "vgg"},
        {"features": "layers.0"},
        lpips_names(FEATURES),
        {old: f"block{new[4]}.conv{new[6]}" for old, new in paper_names(FEATURES).items()},
    ],
    ids=["Gatys", "SSD", "sequential", "LPIPS", "blocks"],
)
def test_features_under_other_names_are_read(names, suffix, tmp_path):
    arrays = arrays_of(FEATURES)
    loaded = load_file(save(tmp_path / f"a.{suffix}", renamed(arrays, names)))
    check(loaded, FEATURES, arrays, "are the convolutional part of the VGG-16")


def test_bare_numbers_with_batch_norm_are_read(tmp_path):
    model = VGG(13, batch_norm=True, num_classes=None, hidden=())
    arrays = arrays_of(model)
    theirs = {name.removeprefix("features."): array for name, array in arrays.items()}
    check(load_file(save(tmp_path / "a.pth", theirs)), model, arrays, "part of the VGG-13 with batch norm")


def test_detectors_and_metrics_give_their_features(tmp_path):
    """SSD and LPIPS have convolutions of their own after the VGG's."""
    arrays = arrays_of(FEATURES)
    extra = {"vgg.31.weight": np.ones((128, 64, 3, 3), np.float32), "vgg.31.bias": np.ones(128, np.float32)}
    path = save(tmp_path / "ssd.pth", renamed(arrays, {"features": "vgg"}) | extra)
    with raises_user_error("vgg.31.weight (128, 64, 3, 3)", "pass features_only=True"):
        load_file(path)
    check(load_file(path, features_only=True), FEATURES, arrays, "left out vgg.31.weight (128, 64, 3, 3)")
    extra = {"lin0.model.1.weight": np.ones((1, 8, 1, 1), np.float32)}
    shift = {"scaling_layer.shift": np.ones((1, 3, 1, 1), np.float32)}
    path = save(tmp_path / "lpips.pth", {**shift, **renamed(arrays, lpips_names(FEATURES)), **extra})
    check(load_file(path, features_only=True), FEATURES, arrays, "left out lin0.model.1.weight", "scaling_layer.shift")


def test_order_of_numbers_decides_in_safetensors(tmp_path):
    """The names are sorted as text in such a file, so that 10 comes before 2."""
    arrays = arrays_of(VGG(19, num_classes=None, hidden=()))
    loaded = load_file(save(tmp_path / "a.safetensors", renamed(arrays, {"features": "body"})))
    check(loaded, VGG(19, num_classes=None, hidden=()), arrays)


def test_pools_at_other_places_are_refused(tmp_path):
    """The numbers of a Sequential show that a max pool is missing, or that dropout stands between convolutions."""
    arrays = arrays_of(VGG(16, pool_after=(1, 3), num_classes=None, hidden=()))
    for theirs in (arrays, renamed(arrays, {"features": "vgg"})):
        with raises_user_error("leave no room for the layers of a VGG", "from_torch"):
            load_file(save(tmp_path / "a.pth", theirs))


def test_group_norm_is_refused(tmp_path):
    arrays = renamed(arrays_of(VGG(16, batch_norm=True, num_classes=None, hidden=())), {"features": "body"})
    theirs = {name: array for name, array in arrays.items() if "running" not in name}
    with raises_user_error("found no features.0.weight"):
        load_file(save(tmp_path / "a.pth", theirs), features_only=True)


def test_adain_encoder_is_read(tmp_path):
    """Its first convolution, which turns RGB into normalized BGR, is folded; inside, the maps agree with torch's."""
    torch.manual_seed(0)
    widths = [(3, 8), (8, 8), "pool", (8, 16), (16, 16), "pool", (16, 32)]
    layers = [torch.nn.Conv2d(3, 3, 1)]
    for width in widths:
        if width == "pool":
            layers.append(torch.nn.MaxPool2d(2))
        else:
            layers += [torch.nn.ReflectionPad2d(1), torch.nn.Conv2d(*width, 3), torch.nn.ReLU()]
    encoder = torch.nn.Sequential(*layers).double()
    assert [name for name in encoder.state_dict() if name.endswith("weight")][:4] == [
        f"{i}.weight" for i in (0, 2, 5, 9)
    ]
    torch.save({name: tensor.float() for name, tensor in encoder.state_dict().items()}, tmp_path / "a.pth")
    loaded = load_file(tmp_path / "a.pth")
    for part in ("0, a 1x1 convolution of the images, is folded into conv1_1", "padding by reflection", "VGG-13"):
        assert any(part in note for note in loaded.notes), loaded.notes
    assert loaded.model.final_layer == "relu3_1"
    images = np.random.default_rng(0).normal(size=(1, 48, 48, 3)).astype(np.float32)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images.transpose(0, 3, 1, 2)).double()).numpy().transpose(0, 2, 3, 1)
    maps = np.asarray(loaded.model.apply(loaded.variables, images))
    assert maps.shape == expected.shape == (1, 12, 12, 32)
    np.testing.assert_allclose(maps[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tf_slim_names_are_read(suffix, tmp_path):
    arrays = arrays_of(HEADED)
    theirs = {}
    for name, array in renamed(arrays, paper_names(HEADED)).items():
        module, leaf = name.rsplit(".", 1)
        scope = f"{module[:5]}/{module}" if module.startswith("conv") else module
        if leaf == "weight":
            size = {"fc6": 7}.get(module, 1)
            array = (array if array.ndim == 4 else array.reshape(len(array), -1, size, size)).transpose(2, 3, 1, 0)
        theirs[f"vgg_16/{scope}/{'weights' if leaf == 'weight' else 'biases'}"] = array
    assert theirs["vgg_16/fc6/weights"].shape == (7, 7, 64, 12)
    theirs["global_step"] = np.array(3)
    loaded = load_file(save(tmp_path / f"a.{suffix}", theirs))
    check(loaded, HEADED, arrays, "its names and layouts are TensorFlow's", "its head consists of convolutions")


# --- whose images they are for


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_torchvisions_own_layout_is_imagenets(layout, tmp_path, monkeypatch):
    assert is_imagenets(VGG(16), 3)
    assert not any(
        [is_imagenets(VGG(16), 1), is_imagenets(VGG(16, hidden=(12, 12)), 3), is_imagenets(VGG(11, lrn=True), 3)]
    )
    monkeypatch.setattr("vgg_jax.weights.imagenet_classes.HIDDEN", (12, 12))  # narrow layers, for speed
    model = VGG(11, hidden=(12, 12))
    arrays = arrays_of(model)
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    theirs = dict(arrays)
    if layout == "timm":
        for name, size in (("classifier.0.weight", 7), ("classifier.3.weight", 1)):
            theirs[name] = arrays[name].reshape(12, -1, size, size)
        theirs = renamed(theirs, names)
    read = load_file(save(tmp_path / "a.safetensors", theirs))
    assert (read.preprocessing, read.classes) == (IMAGENET, imagenet_classes())
    assert len([note for note in read.notes if "ImageNet" in note]) == 1
    read = load_file(tmp_path / "a.safetensors", features_only=True)
    assert (read.preprocessing, read.classes) == (IMAGENET, None)
    torch.save(
        {"state_dict": {name: torch.from_numpy(np.array(array)) for name, array in theirs.items()}}, tmp_path / "b"
    )
    read = load_file(tmp_path / "b")
    assert (read.preprocessing, read.classes) == (None, None)


@pytest.mark.parametrize("model", [VGG(11, num_classes=1000, pool_size=1, hidden=()), VGG(11)])
def test_other_shapes_are_not_imagenets(model, tmp_path):
    read = load_file(save(tmp_path / "a.safetensors", arrays_of(model.clone(hidden=model.hidden and (12, 12)))))
    assert (read.preprocessing, read.classes) == (None, None)


OTHER = ("--mean=0.4,0.5,0.6", "--std=0.2,0.3,0.4", "--resize=32", "--crop=32")


@pytest.mark.parametrize(
    ("suffix", "options", "mean", "std", "order"),
    [
        ("pth", ["--preprocessing=cifar10"], CIFAR10.mean, CIFAR10.std, "RGB"),
        ("safetensors", OTHER, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "RGB"),
        ("pth", [*OTHER, "--channel-order=BGR"], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "BGR"),
        ("pth", ["--preprocessing=authors", "--resize=32", "--crop=32"], AUTHORS.mean, AUTHORS.std, "BGR"),
    ],
    ids=["CIFAR", "mean", "BGR", "authors"],
)
def test_networks_of_other_data_need_their_preprocessing(suffix, options, mean, std, order, tmp_path, capsys):
    """Without options the command refuses; with them it gives the probabilities of views made by hand."""
    model = VGG(11, **SMALL)
    variables = random_variables(model, 32, 32, 3)
    variables["params"]["fc8"]["kernel"] *= 100 * min(std)  # so that the view shows, and no probability is 1
    weights, image = save(tmp_path / f"a.{suffix}", to_torch(model, variables)), tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(image)
    command = ["--weights", str(weights), "--json", "--top=10", str(image)]
    assert predict.main(command) == 2
    (error,) = capsys.readouterr().err.splitlines()
    for option in ("imagenet, authors or cifar10", "--mean", "--std", "--resize", "--crop", "--channel-order"):
        assert option in error
    assert predict.main([*command, *options]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]

    def expected(order):
        view = (pixels[..., :: -1 if order == "BGR" else 1] / 255 - mean) / std
        probabilities = jax.nn.softmax(model.apply(variables, view[None].astype(np.float32))[0])
        return np.asarray(probabilities)[[answer["class"] for answer in answers]]

    np.testing.assert_allclose([answer["probability"] for answer in answers], expected(order), rtol=1e-3)
    assert np.abs(expected("RGB") - expected("BGR")).max() > 1e-3
