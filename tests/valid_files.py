"""Valid files of every kind that users bring, for `tests.fuzz`, and how such files are read."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any


def weights(suffix: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
    def examples(folder: pathlib.Path) -> dict[str, bytes]:
        import torch

        from tests.conftest import random_variables  # here, because it sets JAX up
        from vgg_jax.data.preprocessing import CIFAR10
        from vgg_jax.model import VGG
        from vgg_jax.weights.formats import Loaded, save_file
        from vgg_jax.weights.layouts import to_torch

        model = VGG(11, batch_norm=True, num_classes=3, pool_size=1, hidden=(4,))
        variables = random_variables(model, 32, 32, 3)
        arrays = to_torch(model, variables)
        if suffix == ".h5":
            return _keras_files(folder)
        if suffix == ".onnx":
            return _onnx_files(folder, Loaded(model, variables, CIFAR10, ("a", "b", "c"), "softmax"))
        save_file(folder / f"own{suffix}", Loaded(model, variables, CIFAR10, ("a", "b", "c"), "softmax"))
        contents = {f"own{suffix}": _sorted_header((folder / f"own{suffix}").read_bytes())}
        if suffix == ".pth":
            tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            wrapped = {
                "epoch": 3,
                "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
                "args": None,
            }
            torch.save(wrapped, folder / "wrapped.pth")
            torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
            contents |= {name: (folder / name).read_bytes() for name in ("wrapped.pth", "old.pth")}
        return contents

    return examples


def _onnx_files(folder: pathlib.Path, network: Any) -> dict[str, bytes]:
    """Return ONNX files with many kinds of nodes: for pixels, for small images and for large ones."""
    from vgg_jax.export.onnx_file import write_onnx
    from vgg_jax.export.onnx_options import OnnxOptions

    options = OnnxOptions("NHWC", uint8=True, softmax=True)
    write_onnx(folder / "pixels.onnx", network, options)
    write_onnx(folder / "own.onnx", network)
    bare = network._replace(preprocessing=None, classes=None)
    write_onnx(folder / "large.onnx", bare, OnnxOptions(size=(64, 96), fold=True))
    names = ("pixels.onnx", "own.onnx", "large.onnx", "torch.onnx")
    _export_by_torch(folder / "torch.onnx")
    return {name: (folder / name).read_bytes() for name in names}


def _export_by_torch(path: pathlib.Path) -> None:
    """Write a file of PyTorch's old exporter, with local response normalization as many nodes."""
    import torch

    from tests.weights import onnx_graphs
    from vgg_jax.model import TABLE_1

    onnx_graphs.NARROW_TABLE = TABLE_1  # this process is the fuzzer's own, with tiny networks
    layer = torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)
    onnx_graphs.export(onnx_graphs.HandWritten(layer).eval(), str(path), dynamo=False, size=(32, 32))


def _sorted_header(data: bytes) -> bytes:
    """Return a .safetensors file with a header in a fixed order; the library's varies. Other files are unchanged."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        return data
    text = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _keras_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Return small files in the layouts of Keras 2 and Keras 3, written by h5py."""
    import h5py
    import numpy as np

    from vgg_jax.model import TABLE_1

    rng = np.random.default_rng(0)
    with h5py.File(folder / "keras2.h5", "w") as old, h5py.File(folder / "keras3.weights.h5", "w") as new:
        channels = 3
        for s, widths in enumerate(TABLE_1["D"], 1):
            for i, width in enumerate(widths, 1):
                name = f"block{s}_conv{i}"
                arrays = rng.normal(size=(3, 3, channels, width)).astype("f4"), np.zeros(width, "f4")
                group = old.create_group(name)
                group.attrs["weight_names"] = [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
                group[f"{name}/kernel:0"], group[f"{name}/bias:0"] = arrays
                new[f"layers/{name}/vars/0"], new[f"layers/{name}/vars/1"] = arrays
                channels = width
        old.attrs["layer_names"] = [name.encode() for name in old]
    return {name: (folder / name).read_bytes() for name in ("keras2.h5", "keras3.weights.h5")}


def images(*suffixes: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
    def examples(folder: pathlib.Path) -> dict[str, bytes]:
        import numpy as np
        import PIL.Image

        rng, contents = np.random.default_rng(0), {}
        for mode, shape in (("RGB", (40, 48, 3)), ("L", (33, 40))):
            image = PIL.Image.fromarray(rng.integers(0, 256, shape, np.uint8))
            exif = PIL.Image.Exif()
            exif[0x0112] = 6  # orientation
            for suffix in suffixes:
                path = folder / "train" / "a" / f"{mode}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, exif=exif)
                contents[str(path.relative_to(folder))] = path.read_bytes()
        return contents

    return examples


def run(*names: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
    """Return the function that makes a run of one checkpoint, and returns those of its files that have these names."""

    def examples(folder: pathlib.Path) -> dict[str, bytes]:
        import jax

        from tests.conftest import random_variables
        from vgg_jax.config import Config, DataConfig, ModelConfig
        from vgg_jax.training.checkpoints import Checkpoints
        from vgg_jax.training.optimizer import make_optimizer, make_schedule
        from vgg_jax.training.run_directory import open_run
        from vgg_jax.training.state import create_train_state
        from vgg_jax.training.validation import create_model

        data = DataConfig(mean=(0.5,), std=(0.5,), class_names=("a", "b"))
        config = Config(model=ModelConfig(depth=11, num_classes=2), data=data)
        model = create_model(config.model)
        create = functools.partial(
            create_train_state, model=model, optimizer=make_optimizer(config.optimizer, make_schedule(config, 200))
        )
        shapes = jax.eval_shape(functools.partial(create, image_shape=(32, 32, 1)), jax.random.key(0))
        state = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
        variables = random_variables(model, 32, 32, 1)
        state = state.replace(params=variables["params"], batch_stats=variables["batch_stats"])
        with open_run(str(folder / "run"), config) as write_config:
            write_config()
        checkpoints = Checkpoints(str(folder / "run" / "checkpoints"))
        checkpoints.save(state, {"accuracy": 0.5, "loss": 1.0})
        checkpoints.close()
        files = [path for path in (folder / "run").rglob("*") if path.name in names and path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return examples


def read_weights(folder: pathlib.Path, name: str, data: bytes) -> Any:
    from vgg_jax.network import load

    path = folder / name
    path.write_bytes(data)
    return load(path)


def read_image_file(folder: pathlib.Path, name: str, data: bytes) -> Any:
    """Read an image as prediction does; if it is refused there, training must refuse it too."""
    from vgg_jax.data.dataset import open_split
    from vgg_jax.data.image_files import read_image
    from vgg_jax.data.preprocessing import CIFAR10
    from vgg_jax.errors import UserError

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    split = open_split(str(folder), "train", data_dir="")
    index = next(i for i in range(len(split)) if split.records.locate(i) == str(path))
    results = []
    for read in (
        lambda: read_image(str(path), CIFAR10.view),
        lambda: split.test_view(index)[0],
        lambda: split.pixels(index),
        lambda: split.size(index),
    ):
        try:
            results.append(read())
        except UserError as error:
            results.append(error)
    for error in results:
        if isinstance(error, Exception):
            raise error
    assert results[3] == results[2][0].shape[:2], (results[3], results[2][0].shape)
    return results


def read_run(folder: pathlib.Path, name: str, data: bytes) -> Any:
    from vgg_jax.network import load

    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        return load(folder / "run")
    finally:
        path.write_bytes(whole)
