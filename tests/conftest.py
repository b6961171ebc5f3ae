"""Settings and fixtures of all tests: eight CPU devices, torchvision on a CPU build of PyTorch, small data sets."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # otherwise XLA logs each program that it loads from the cache
# Compilation takes most of the tests' time. Without LLVM's optimizations a step of VGG-11 compiles in 3 instead of 12 s
# and runs four times as long. XLA's older emitters compile in two thirds of the time; JAX 0.10 is the last version that
# has them. `XLA_FLAGS= pytest`, and the training on the digits, test programs compiled as for users.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

os.environ["VGG_JAX_SETTINGS"] = "off"  # for this process: the tests have a compilation cache of their own
from benchmarks.pytorch import import_torchvision
from tests.narrow import NARROW_TABLE
from vgg_jax.runtime import keep_freed_memory

del os.environ["VGG_JAX_SETTINGS"]  # so that the processes which the tests start have the settings

keep_freed_memory(one_arena=True)  # the tests of full networks take a tenth less time

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Share compiled programs between the processes of a run, and give each process its own cores.

    The commands that the tests start use the same cache. Without cores of their own, the threads of several processes
    disturb each other, which costs a tenth of the time.
    """
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = cores[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]
        os.sched_setaffinity(0, share or cores)
    if not worker:
        config.compilation_cache = tempfile.mkdtemp(prefix="vgg_jax-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compilation_cache


def pytest_unconfigure(config):
    if hasattr(config, "compilation_cache"):
        shutil.rmtree(config.compilation_cache)


@pytest.fixture(scope="session")
def torchvision():
    return import_torchvision()


@pytest.fixture(scope="session")
def timm(torchvision):
    """Return timm, which imports torchvision."""
    import timm

    return timm


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def without_jaxtyping():
    """Suspend the check of the annotations, which refuses a wrong array before the network can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def narrow(monkeypatch):
    """Give all networks an eighth of their channels, for properties that do not depend on the width.

    A training step of VGG-11 on 8 devices then takes 0.2 s instead of 9 s.
    """
    monkeypatch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)


@pytest.fixture
def narrow_timm(timm, narrow, monkeypatch):
    """Return timm, whose VGGs have an eighth of their channels, as ours."""
    for name, layers in timm.models.vgg.cfgs.items():
        monkeypatch.setitem(timm.models.vgg.cfgs, name, [n if n == "M" else n // 8 for n in layers])
    return timm


@pytest.fixture
def winograd(monkeypatch):
    """Use Winograd's algorithm in layers of any size, because few layers of the tests reach its threshold.

    Maps with several bands are computed in bands, and everything as on one device instead of the tests' eight.
    """
    monkeypatch.setattr("vgg_jax.ops.conv3x3.SMALLEST_WORK", 0)
    monkeypatch.setattr("vgg_jax.ops.methods.SMALLEST_BAND", 64)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Return a TFDS data directory that contains the digits."""
    from vgg_jax.data.prepare import digits

    path = str(tmp_path_factory.mktemp("tfds"))
    digits.prepare(path)
    return path


FORKS = """
import json
import os
import sys

sys.path.insert(0, os.getcwd())
from vgg_jax.cli import train
from vgg_jax.training import loop

for line in sys.stdin:
    if os.fork() == 0:
        sys.argv, errors = json.loads(line)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        sys.exit(train.main())
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="session")
def run_fork(tmp_path_factory):
    """Return a function that runs a command of `train.py` and returns its exit code and standard error.

    Each command runs in a fork of one process that has imported the modules; the import takes 3 s.
    """
    errors = tmp_path_factory.mktemp("forks") / "stderr"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    root = pathlib.Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=root, **pipes) as parent:

        def run(command):
            errors.unlink(missing_ok=True)
            parent.stdin.write(json.dumps([command[1:], str(errors)]) + "\n")
            return int(parent.stdout.readline()), errors.read_text()

        yield run
        parent.stdin.close()


def random_variables(model, *image_shape):
    """Draw variables as in a new network for images (H, W, C), by NumPy because `model.init` compiles for seconds."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape), model.dtype))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name != "kernel":
            return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)
        std = 0.01 if leaf.ndim == 2 else np.sqrt(2 / (leaf.shape[0] * leaf.shape[1] * leaf.shape[3]))
        return jnp.asarray(std * random.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def relative_error(actual, expected):
    """Return the norm of the difference of two trees, divided by the norm of the expected one."""
    actual, expected = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def write_tfds(data_dir, name, version, features, splits):
    """Write a TFDS data set in array_record format without TensorFlow; `splits` maps names to lists of examples."""
    import tensorflow_datasets as tfds

    directory = os.path.join(data_dir, name, version)
    os.makedirs(directory)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=directory, module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=10_000, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


def write_cifar10(data_dir, num_train, num_test):
    """Write a cifar10 3.0.2 whose images are noise around one color for each class."""
    import tensorflow_datasets as tfds
    from PIL import Image

    random = np.random.default_rng(0)
    colors = random.integers(0, 256, (10, 1, 1, 3))

    def examples(split, count):
        for i in range(count):
            noise = random.integers(-60, 60, (32, 32, 3))
            image = np.clip(colors[i % 10] + noise, 0, 255).astype(np.uint8)
            yield {"image": Image.fromarray(image), "label": i % 10, "id": f"{split}_{i:05d}"}

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    splits = {"train": list(examples("train", num_train)), "test": list(examples("test", num_test))}
    write_tfds(data_dir, "cifar10", "3.0.2", features, splits)


def photographs(count, seed=0):
    """Return crops of odd sizes from the two photographs of scikit-learn, as PIL images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    crops = []
    for i in range(count):
        width, height = (int(n) for n in random.integers(180, 420, 2))
        left, top = int(random.integers(640 - width)), int(random.integers(427 - min(height, 426)))
        crops.append(sources[i % 2].crop((left, top, left + width, min(top + height, 427))))
    return crops


@contextlib.contextmanager
def raises_user_error(*parts):
    """Expect a UserError whose message contains every part."""
    from vgg_jax.errors import UserError

    with pytest.raises(UserError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)
