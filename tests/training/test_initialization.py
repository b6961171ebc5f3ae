"""Layers from another network and frozen layers, in the step and in `train.py`."""

import dataclasses
import functools
import importlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.cli.test_train import NARROW, ROOT, SMALL_IMAGES, accuracy, command, saved_arrays, train
from tests.conftest import raises_user_error, random_variables
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import VGG, Network, load, to_torch
from vgg_jax.config import Config, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import AUTHORS, CIFAR10
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.initialization import source_variables
from vgg_jax.training.optimizer import make_optimizer, make_plateau, make_schedule
from vgg_jax.training.run_directory import open_run
from vgg_jax.training.state import create_train_state
from vgg_jax.training.step import eval_step, train_step
from vgg_jax.training.validation import check_config, create_model
from vgg_jax.weights.formats import Loaded, save_file

SMALL = dict(depth=11, batch_norm=True, pool_size=1, pool_after=(1, 2, 3, 4))
IMAGE_SHAPE = (16, 16, 1)
ADAM = OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant")
KEY = jax.random.key(1, impl="unsafe_rbg")  # its draws compile fastest
optimizer = make_optimizer(ADAM, optax.constant_schedule(1e-3))


@functools.cache
def trained():
    """Return variables of another network with five classes: random numbers that no new network has."""
    model = VGG(**SMALL, num_classes=5, hidden=())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.01, 0.1, leaf.shape), leaf.dtype), shapes)


@functools.cache
def states():
    """Return the state with frozen features of the other network, and the state of a new network."""
    model = VGG(**SMALL, num_classes=10, hidden=(64, 32))
    create = functools.partial(create_train_state, KEY, model, optimizer, IMAGE_SHAPE, frozen=("features",))
    new = functools.partial(create_train_state, KEY, model, optimizer, IMAGE_SHAPE)
    return jax.jit(create)(source=trained()), jax.jit(new)()


def make_batch(seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(8, *IMAGE_SHAPE)).astype(np.float32),
        "label": random.integers(0, 10, 8).astype(np.int32),
    }


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_features_come_from_the_source_and_head_is_new(narrow):
    state, new = states()
    assert set(state.params) == {"fc6", "fc7", "fc8"}
    features = {layer: p for layer, p in trained()["params"].items() if layer != "fc8"}
    assert_equal(state.frozen_params, features)
    assert_equal(state.batch_stats, trained()["batch_stats"])
    assert_equal(state.params, {layer: new.params[layer] for layer in state.params})


def test_only_named_layers_come_from_the_source(narrow):
    model = VGG(**SMALL, num_classes=5, hidden=())
    layers = ("conv2_1", "bn3_1", "head")
    state = create_train_state(KEY, model, optimizer, IMAGE_SHAPE, trained(), layers)
    new = create_train_state(KEY, model, optimizer, IMAGE_SHAPE)
    for collection in ("params", "batch_stats"):
        for layer, arrays in state.variables[collection].items():
            source = trained() if layer in ("conv2_1", "bn3_1", "fc8") else new.variables
            assert_equal(arrays, source[collection][layer])
    assert not state.frozen_params


def paper_config():
    """Return `configs/imagenet_paper.py` for small images."""
    config = importlib.import_module("configs.imagenet_paper").get_config()
    config.model = dataclasses.replace(
        config.model, num_classes=10, pool_size=1, hidden=(64, 32), pool_after=(1, 2, 3, 4), dtype="float32"
    )
    return config


def test_preinitialization_takes_the_layers_of_the_paper_by_name(narrow):
    """Column D takes four convolutions of net A, which are not its own first four, and the dense layers."""
    config = paper_config()
    net_d = create_model(config.model)
    net_a = net_d.clone(depth=11)
    source = create_train_state(KEY, net_a, optimizer, (16, 16, 3)).variables
    source = jax.tree.map(lambda a: a + 1, source)
    state = create_train_state(KEY, net_d, optimizer, (16, 16, 3), source, config.init_layers)
    new = create_train_state(KEY, net_d, optimizer, (16, 16, 3))
    copied = {"conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8"}
    assert len(state.params) == 16
    for layer, arrays in state.params.items():
        assert_equal(arrays, (source["params"] if layer in copied else new.params)[layer])


def test_fine_tuning_takes_the_network_without_optimizer_state(tmp_path, narrow):
    """The source is a run at S = 256 with momentum and a reduced rate; neither is taken."""
    config = paper_config()
    model, plateau = create_model(config.model), make_plateau(config.optimizer)
    create = functools.partial(create_train_state, KEY, model, image_shape=(16, 16, 3), plateau=plateau)
    before = create(optimizer=make_optimizer(config.optimizer, make_schedule(config, 512)))
    reduced = before.plateau._replace(scale=jnp.float32(0.01))
    before = before.replace(plateau=reduced, opt_state=jax.tree.map(jnp.ones_like, before.opt_state), step=7)
    with open_run(str(tmp_path), config) as write_config:
        write_config()
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(before, None)
    checkpoints.close()

    # As in the docstring of the configuration.
    fine = paper_config()
    fine.init_from, fine.init_layers, fine.optimizer.learning_rate = str(tmp_path), ("features", "head"), 0.001
    fine.data.train_scale, fine.data.resize = (384, 384), 384
    check_config(fine)
    schedule = make_schedule(fine, 512)
    state = create(
        optimizer=make_optimizer(fine.optimizer, schedule),
        source=source_variables(fine, model),
        source_layers=fine.init_layers,
    )
    assert_equal(state.params, before.params)
    assert state.step == 0
    assert float(schedule(0) * state.rate_scale) == pytest.approx(0.001)
    assert float(schedule(0) * before.rate_scale) == pytest.approx(0.00001)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_frozen_layers_stay_unchanged_without_optimizer_state(narrow):
    state, _ = states()
    head_shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(head_shapes * 2)  # the two moments of Adam

    after = state
    step = jax.jit(train_step)
    for seed in range(3):
        after, _ = step(after, make_batch(seed), jax.random.key(2))
    assert_equal(after.frozen_params, state.frozen_params)
    assert_equal(after.batch_stats, state.batch_stats)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert jax.tree.all(moved)


def test_donating_step_leaves_the_source_intact(narrow):
    model = VGG(**SMALL, num_classes=10, hidden=(64, 32))
    before = jax.tree.map(np.array, trained())
    state = create_train_state(KEY, model, optimizer, IMAGE_SHAPE, trained(), frozen=("features",))
    jax.jit(train_step, donate_argnums=0)(state, make_batch(), jax.random.key(2))
    assert_equal(trained(), before)


def test_some_of_the_features_can_be_frozen(narrow):
    model = VGG(**SMALL, num_classes=10, hidden=())
    frozen = ("conv1_1", "bn1_1", "conv2_1")
    create = functools.partial(create_train_state, KEY, model, optimizer, IMAGE_SHAPE, frozen=frozen)
    state = jax.jit(create)(source=trained())
    after, _ = jax.jit(train_step)(state, make_batch(), jax.random.key(2))
    assert_equal(after.frozen_params, state.frozen_params)
    assert set(after.frozen_params) == set(frozen)
    moved = {
        layer
        for layer, statistics in after.batch_stats.items()
        if (statistics["mean"] != state.batch_stats[layer]["mean"]).any()
    }
    assert moved == set(state.batch_stats) - {"bn1_1"}


def test_model_accepts_features_as_a_frozen_part(narrow):
    model = VGG(**SMALL, num_classes=5, hidden=())
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"], frozen=("features",)))
    _, updates = apply(trained(), make_batch()["image"])
    assert_equal(updates["batch_stats"], trained()["batch_stats"])


def test_frozen_batch_norm_uses_running_statistics(narrow):
    """Without dropout, the training loss equals the evaluation loss only if the features are frozen."""
    batch = make_batch()
    for state, equal in zip(states(), (True, False), strict=True):
        model = VGG(**SMALL, num_classes=10, hidden=(64, 32), dropout_rate=0.0)
        state = state.replace(apply_fn=model.apply)
        _, metrics = jax.jit(train_step)(state, batch, jax.random.key(0))
        sums = jax.jit(eval_step)(state, {**batch, "weight": jnp.ones(8)})
        difference = abs(float(metrics["loss"]) / (float(sums["loss"]) / 8) - 1)
        assert (difference < 1e-5) == equal


def test_frozen_features_save_three_fifths_of_the_work(narrow):
    """The forward pass is a third of the work; the features need no backward pass."""
    flops = []
    for state in states():
        compiled = jax.jit(train_step).lower(state, make_batch(), jax.random.key(0)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert 0.2 < flops[0] / flops[1] < 0.4


def test_every_mismatching_layer_is_named(narrow):
    model = VGG(**SMALL, num_classes=10, hidden=(64, 32))
    with raises_user_error("conv1_1 is", "(3, 3, 1, 8)", "(3, 3, 3, 8)", "fc6 is missing", "fc8 is"):
        create_train_state(KEY, model, optimizer, (16, 16, 3), trained(), ("features", "head"))
    plain = VGG(**SMALL | {"batch_norm": False}, num_classes=5, hidden=())
    with raises_user_error("the source also has bn1_1, bn2_1, ", "expected the features of the network"):
        create_train_state(KEY, plain, optimizer, IMAGE_SHAPE, trained())
    deeper = VGG(**SMALL | {"depth": 13}, num_classes=5, hidden=())
    with raises_user_error("conv1_2 is missing", "bn2_2 is missing"):
        create_train_state(KEY, deeper, optimizer, IMAGE_SHAPE, trained())


def test_unknown_or_only_frozen_layers_are_refused(narrow):
    model = VGG(**SMALL, num_classes=5, hidden=())
    with pytest.raises(ValueError, match="found no layer conv9_9 with parameters; expected some of features, head, s"):
        create_train_state(KEY, model, optimizer, IMAGE_SHAPE, frozen=("conv9_9",))
    with pytest.raises(ValueError, match="all layers are frozen"):
        create_train_state(KEY, model, optimizer, IMAGE_SHAPE, frozen=("features", "head"))


def test_source_with_other_features_is_refused_and_bgr_reversed(tmp_path, capsys):
    config = Config(init_from=str(tmp_path / "source.safetensors"))
    fields = dict(depth=11, num_classes=10, pool_size=1, hidden=())
    config.model = ModelConfig(**fields, batch_norm=False)
    model = create_model(config.model)
    variables = random_variables(model, 32, 32, 3)
    save_file(config.init_from, Loaded(model, variables, dataclasses.replace(AUTHORS, resize=32, crop=32)))
    kernel = source_variables(config, model)["params"]["conv1_1"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["conv1_1"]["kernel"][:, :, ::-1])
    assert "note: " in capsys.readouterr().err
    config.data.mean, config.data.std = AUTHORS.mean[::-1], AUTHORS.std
    source_variables(config, model)
    assert capsys.readouterr().err == ""
    for field, value in (("batch_norm", True), ("depth", 13), ("lrn", True), ("pool_after", (1, 2, 3))):
        other = VGG(**{**fields, field: value})
        with raises_user_error("differ from those of config.model", f"it has {field} ", f"expected {value}"):
            source_variables(config, other)


def test_notes_of_the_source_are_printed_and_its_head_left_out(narrow, tmp_path, capsys):
    config = Config(ModelConfig(11, batch_norm=False, num_classes=10), init_from=str(tmp_path / "source.safetensors"))
    model = create_model(config.model)
    arrays = {f"module.{name}": array for name, array in to_torch(model, random_variables(model, 32, 32, 3)).items()}
    strange = {"neck.weight": np.ones((3, 5), np.float32)}
    safetensors.numpy.save_file({k: np.ascontiguousarray(a) for k, a in (arrays | strange).items()}, config.init_from)
    source_variables(config, model)
    printed = capsys.readouterr().err
    assert f"note: {config.init_from}: removed module. from the names" in printed
    assert "left out" in printed
    config.init_layers = ("features", "head")
    with raises_user_error("neck.weight"):
        source_variables(config, model)


def test_folders_and_repositories_are_sources(narrow, tmp_path, monkeypatch):
    """A folder in timm's shape, and the same files as the hub's client gives them."""
    import huggingface_hub

    folder = tmp_path / "net"
    model = VGG(11, num_classes=10, hidden=(8, 4096))
    net = Network(model, random_variables(model, 32, 32, 3), CIFAR10)
    net.save(folder)
    config = Config(ModelConfig(11, batch_norm=False, num_classes=10), init_from=str(folder))
    features = {name: leaves for name, leaves in net.variables["params"].items() if name.startswith("conv")}
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, revision))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in (str(folder), "hf-hub:me/net@v1"):
        config.init_from = source
        found = source_variables(config, create_model(config.model))["params"]
        assert_equal_trees({name: found[name] for name in features}, features)
    assert asked[0] == ("me/net", "v1")
    config.init_step = "best"
    with raises_user_error("hf-hub:me/net@v1, is not the directory of a run"):
        source_variables(config, create_model(config.model))


def test_run_is_loaded_on_another_number_of_devices(tmp_path, narrow):
    """A run saved from eight devices is loaded on one; loaded on eight, it is committed to none of them."""
    assert jax.device_count() == 8
    config = Config(model=ModelConfig(**SMALL, num_classes=10, hidden=(64, 32)))
    config.data.mean, config.data.std = (0.3,), (0.3,)
    with open_run(str(tmp_path), config) as write_config:
        write_config()
    state = jax.device_put(states()[0], NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P()))
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(state, None)
    checkpoints.close()
    code = """
import sys, jax, vgg_jax.model
from tests.narrow import NARROW_TABLE
vgg_jax.model.TABLE_1 = NARROW_TABLE
print(jax.device_count(), vgg_jax.load(sys.argv[1]).model.depth)
"""
    loaded = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert loaded.stdout == "1 11\n", loaded.stderr
    variables = load(tmp_path).variables
    assert not any(leaf.committed for leaf in jax.tree.leaves(variables))
    assert_equal(variables, jax.device_get(state.variables))


@pytest.mark.slow
def test_transfer_from_a_run(data_dir, tmp_path, narrow):
    """A run on the digits 5 to 9 starts from one on 0 to 4, resumes without the source, and is loaded."""
    source, workdir = tmp_path / "source", tmp_path / "transfer"
    small = (*SMALL_IMAGES, "model.hidden=(256, 128)")
    train("digits_features.py", source, data_dir, *small, "num_epochs=10", script=NARROW)
    fields = (*small, f"init_from={source}", "log_every_steps=1", "optimizer.learning_rate=0.005")
    output = train("digits_transfer.py", workdir, data_dir, *fields, "num_epochs=3", script=NARROW)
    assert "50 training and 180 evaluation images; 3 steps" in output
    assert "of which 99,978 train" in output  # 256 x 256, 256 x 128, 128 x 10 and their biases

    before, after = saved_arrays(source), saved_arrays(workdir)
    frozen = {path: array for path, array in after.items() if "frozen_params" in path or "batch_stats" in path}
    assert len(frozen) == 8 * 4 + 8 * 2
    for path, array in frozen.items():
        np.testing.assert_array_equal(array, before[path.replace("frozen_params", "params")], err_msg=path)

    shutil.rmtree(source)
    output = train("digits_transfer.py", workdir, data_dir, *fields, "num_epochs=40", script=NARROW)
    assert "resuming from the checkpoint of step 3" in output
    assert accuracy(workdir) > 0.5  # of five classes
    net = load(workdir)
    model, variables = net.model, net.variables
    assert set(variables["params"]) == set(model.layers_with_parameters(("features", "head")))


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("init_from=nowhere", "nowhere does not exist; expected a .pth"),
        ("freeze=('conv1',)", "config.freeze: found no layer conv1 with parameters; expected some of features, head"),
        ("freeze=('features', 'head')", "config.freeze has all layers; expected at least one that trains"),
        (
            "init_from=x --config.init_layers=('conv1_1',) --config.freeze=('conv1_1', 'conv2_1')",
            "config.freeze has conv2_1; exp",
        ),
        ("init_from=x --config.init_layers=()", "config.init_layers is (); expected the layers to take"),
        ("data.classes=(5, 12)", "digits/train has 0 examples of class 12; expected at least 1"),
        ("data.images_per_class=1000", "examples of class 0; expected at least 1000"),
        ("data.classes=(5, 5)", "config.data.classes is (5, 5); expected labels in rising order"),
        ("optimizer.name=lion", "config.optimizer.name is 'lion'; expected one of sgd, adam"),
    ],
)
def test_initialization_mistake_gives_one_line(field, line, data_dir, tmp_path, run_fork):
    returncode, stderr = run_fork(command("digits.py", tmp_path / "run", data_dir, *field.split(" --config.")))
    assert returncode == 2
    (error,) = stderr.splitlines()
    assert line in error
    assert not (tmp_path / "run").exists()
