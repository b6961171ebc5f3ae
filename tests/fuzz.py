"""Reads damaged files: thousands of mutations of files of every kind that users bring.

    python -m tests.fuzz [KIND...] [--count 20000] [--seed 0]

Each mutation must give a result or a UserError: no other exception, no more than 5 seconds and no more than 1 GB of
memory. Prints a line for each kind and one for each failure, and exits with 1 if there is any. A failure names its
number, from which the same mutation can be made again.
"""

import argparse
import copy
import faulthandler
import functools
import io
import json
import pathlib
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

SECONDS, GROWTH = 5.0, 2**30
BLOCK = 1000  # mutations that one process reads
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)
VALUES = (None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 1e308, -0.5, "", "x", "16", "é" * 300, [], {}, [[]])
VALUES += ([1, 2], ["a"], {"a": 1}, {"depth": 16}, [2**40], float("nan"), float("inf"))


class Kind(NamedTuple):
    """One kind of file: its valid examples, how to mutate one, and how users' files of this kind are read."""

    examples: Callable[[pathlib.Path], dict[str, bytes]]  # writes into a folder, returns contents by name
    mutate: Callable[[random.Random, bytes], bytes]
    read: Callable[[pathlib.Path, str, bytes], Any]  # of the folder, the name and the mutated content


def mutate_bytes(random: random.Random, data: bytes) -> bytes:
    """Return the content after one to four changes, half of them in its first 512 bytes."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not content:
            return b""
        length = len(content)
        place = random.choice(
            (
                random.randrange(min(512, length)),
                random.randrange(length),
                max(0, length - 1 - random.randrange(min(1024, length))),
            )
        )
        span = min(random.choice((1, 2, 4, 8, 32, 256)), length - place)
        match random.randrange(8):
            case 0:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place : place + span] = random.randbytes(span)
            case 2:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(INTERESTING) & (2 ** (8 * size) - 1)
                content[place : place + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 3:
                del content[place : place + span]
            case 4:
                content[place:place] = content[place : place + span] * random.choice((1, 1, 50))
            case 5:
                del content[place:]
            case 6:
                content[place : place + span] = bytes(span)
            case 7:
                other = random.randrange(length)
                content[place : place + span] = content[other : other + span]
    return bytes(content)


def mutate_json(random: random.Random, data: bytes) -> bytes:
    """Return JSON in which a value is replaced, removed or renamed; half of the time, change bytes instead."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 2))):
        node, path = tree, []
        while isinstance(node, dict | list) and node and (not path or random.random() < 0.8):
            key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return json.dumps(copy.deepcopy(random.choice(VALUES))).encode()
        parent, key = path[-1]
        match random.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[random.choice(("", "a", key + "_", key.upper()))] = parent.pop(key)
            case 2 if isinstance(parent, dict):
                parent[random.choice(("", "extra", key * 2))] = copy.deepcopy(random.choice(VALUES))
            case _:
                parent[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(tree).encode()


def mutate_safetensors(random: random.Random, data: bytes) -> bytes:
    """Return a file with a mutated JSON header of the right length, or with changed bytes."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__")
    if metadata and random.random() < 0.6:
        name = random.choice(list(metadata))
        metadata[name] = (
            mutate_json(random, metadata[name].encode()).decode(errors="replace") if metadata[name][:1] in "{[" else "x"
        )
        text = json.dumps(header).encode()
    else:
        text = mutate_json(random, json.dumps(header).encode())
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutate_pth(random: random.Random, data: bytes) -> bytes:
    """Return an archive whose pickle is mutated and whose checksums fit, or one with changed bytes."""
    if random.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(random, data)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl") or random.random() < 0.02:
                content = mutate_bytes(random, content)
            if random.random() > 0.01:
                archive.writestr(name, content)
    return target.getvalue()


def mutate_onnx(random: random.Random, data: bytes) -> bytes:
    """Return a graph in which nodes, attributes, constants or sides are changed, or one with changed bytes."""
    import onnx

    if random.random() < 0.4:
        return mutate_bytes(random, data)
    model = onnx.load_model_from_string(data)
    graph = model.graph
    numbers = (-(2**63), -1, 0, 1, 2, 7, 2**20, 2**62)
    kinds = sorted(
        {node.op_type for node in graph.node} | {"Shape", "Concat", "Reshape", "Squeeze", "Pad", "Clip", "Add"}
    )
    for _ in range(random.choice((1, 1, 2, 3))):
        node, tensor = random.choice(graph.node), random.choice(graph.initializer)
        match random.randrange(9):
            case 0:
                node.op_type = random.choice(kinds)
            case 1 if node.input:
                names = [name for other in graph.node for name in (*other.input, *other.output)]
                node.input[random.randrange(len(node.input))] = random.choice(names)
            case 2 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.i = random.choice(numbers)
                attribute.f = random.choice((0.0, -1.0, 1e38, float("nan")))
                for i in range(len(attribute.ints)):
                    attribute.ints[i] = random.choice(numbers)
            case 3 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.type = random.randrange(1, 12)
                del attribute.ints[random.randrange(len(attribute.ints) + 1) :]
            case 4 if tensor.dims:
                tensor.dims[random.randrange(len(tensor.dims))] = random.choice(numbers)
            case 5:
                tensor.data_type = random.randrange(25)
            case 6:
                del graph.node[random.randrange(len(graph.node))]
            case 7:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.external_data.add(key="location", value=random.choice(("", ".", "..", "own.onnx", "/dev/zero")))
                tensor.external_data.add(key="offset", value=random.choice(("0", "-1", "x", "9" * 30)))
            case 8:
                del node.input[:1]
                del node.output[random.randrange(2) :]
    return model.SerializeToString()


def mutate_zip(random: random.Random, data: bytes) -> bytes:
    """Return an archive with one mutated member and checksums that fit, or one with changed bytes."""
    if random.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(random, data)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        chosen = random.choice(source.namelist())
        for name in source.namelist():
            content = source.read(name)
            if name == chosen:
                content = (mutate_json if name.endswith(".json") else mutate_bytes)(random, content)
            archive.writestr(name, content)
    return target.getvalue()


def mutate_png(random: random.Random, data: bytes) -> bytes:
    """Return a PNG file with changed bytes or changed packed pixels; half of the time, its checksums fit."""
    if random.random() < 0.3:
        place = data.index(b"IDAT")
        size = struct.unpack(">I", data[place - 4 : place])[0]
        packed = zlib.compress(mutate_bytes(random, zlib.decompress(data[place + 4 : place + 4 + size])))
        body = b"IDAT" + packed
        chunk = struct.pack(">I", len(packed)) + body + struct.pack(">I", zlib.crc32(body))
        return data[: place - 4] + chunk + data[place + 8 + size :]
    content = mutate_bytes(random, data)
    if random.random() < 0.5 or content[:8] != data[:8]:
        return content
    chunks, place = [content[:8]], 8
    while place + 12 <= len(content):
        size = struct.unpack(">I", content[place : place + 4])[0]
        body = content[place + 4 : place + 8 + size]
        chunks.append(content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + size
    return b"".join([*chunks, content[place:]])


def mutate_run(random: random.Random, data: bytes) -> bytes:
    """Return a mutated file of a checkpoint's metadata: JSON or bytes."""
    return (mutate_json if data[:1] == b"{" else mutate_bytes)(random, data)


def _weights(suffix: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
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
    return {name: (folder / name).read_bytes() for name in ("pixels.onnx", "own.onnx", "large.onnx")}


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


def _images(*suffixes: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
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


def _run(*names: str) -> Callable[[pathlib.Path], dict[str, bytes]]:
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


def _read_weights(folder: pathlib.Path, name: str, data: bytes) -> Any:
    from vgg_jax.network import load

    path = folder / name
    path.write_bytes(data)
    return load(path)


def _read_image(folder: pathlib.Path, name: str, data: bytes) -> Any:
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


def _read_run(folder: pathlib.Path, name: str, data: bytes) -> Any:
    from vgg_jax.network import load

    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        return load(folder / "run")
    finally:
        path.write_bytes(whole)


KINDS = {
    "pth": Kind(_weights(".pth"), mutate_pth, _read_weights),
    "safetensors": Kind(_weights(".safetensors"), mutate_safetensors, _read_weights),
    "h5": Kind(_weights(".h5"), mutate_zip, _read_weights),
    "onnx": Kind(_weights(".onnx"), mutate_onnx, _read_weights),
    "jpeg": Kind(_images(".jpg"), mutate_bytes, _read_image),
    "png": Kind(_images(".png"), mutate_png, _read_image),
    "config": Kind(_run("config.json"), mutate_json, _read_run),
    "run": Kind(_run("_CHECKPOINT_METADATA", "_METADATA", "metrics", "manifest.ocdbt"), mutate_run, _read_run),
}


def make_networks_tiny() -> None:
    """Give all networks of this process a hundredth of the paper's channels, so that a file is read in milliseconds."""
    from vgg_jax.model import TABLE_1

    for column, stages in TABLE_1.items():
        TABLE_1[column] = tuple(tuple(max(1, width // 64) for width in stage) for stage in stages)


def _seconds(kind: str, folder: pathlib.Path, name: str, data: bytes) -> float:
    """Read a file and return the time that it took, also for a file that is refused too late."""
    from vgg_jax.errors import UserError

    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(folder, name, data)
    except UserError:
        if time.monotonic() - start <= SECONDS:
            raise
    return time.monotonic() - start


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0) -> list[str]:
    """Read `count` mutations of files of one kind; return a line for each failure.

    Args:
      kind: a name in KINDS.
      count: the number of mutations.
      seed: the seed of all mutations.
      first: the number of the first mutation.
    """
    from vgg_jax.errors import UserError

    failures, refused = [], 0
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        contents = KINDS[kind].examples(folder)
        for name, content in contents.items():
            KINDS[kind].read(folder, name, content)  # a valid example must be read; this also warms up
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for i in range(first, first + count):
            generator = random.Random(f"{kind}/{seed}/{i}")
            name = generator.choice(list(contents))
            data = KINDS[kind].mutate(generator, contents[name])
            faulthandler.dump_traceback_later(60, exit=True)  # ends a hang; the traceback shows where
            try:
                if _seconds(kind, folder, name, data) > SECONDS:  # again: another process may have had the processor
                    seconds = _seconds(kind, folder, name, data)
                    if seconds > SECONDS:
                        failures.append(f"{kind} {i} ({name}): took {seconds:.1f} s")
            except UserError:
                refused += 1
            except Exception as error:
                failures.append(f"{kind} {i} ({name}): {type(error).__name__}: {error}")
            before, largest = largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if largest - before > GROWTH:
                failures.append(f"{kind} {i} ({name}): {(largest - before) / 2**30:.1f} GiB more memory")
        faulthandler.cancel_dump_traceback_later()
    read = count - refused - len(failures)
    print(f"{kind}: {count} mutations, {refused} refused, {read} read, {len(failures)} failures")
    return failures


def _in_processes(options: argparse.Namespace) -> int:
    """Fuzz in blocks, each in a process of its own, because JAX and Orbax keep a little of every network they read."""
    worst = 0
    for kind in options.kinds or KINDS:
        for first in range(options.first, options.first + options.count, BLOCK):
            count = min(BLOCK, options.first + options.count - first)
            command = [sys.executable, "-m", "tests.fuzz", kind, "--seed", str(options.seed)]
            done = subprocess.run([*command, "--count", str(count), "--first", str(first)], check=False)
            worst = max(worst, abs(done.returncode))
    return worst


def main() -> int:
    """Run the command; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, default=20_000, help="mutations of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation (default: %(default)s)")
    options = parser.parse_args()
    make_networks_tiny()
    if options.count > BLOCK:
        return _in_processes(options)
    failures = [
        line for kind in options.kinds or KINDS for line in fuzz(kind, options.count, options.seed, options.first)
    ]
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
