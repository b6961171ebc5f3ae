"""Files of features: .npz, .safetensors and .parquet, written block by block so that they need not fit into memory."""

import contextlib
import dataclasses
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from vgg_jax.errors import UserError, require
from vgg_jax.evaluation.embeddings import Features
from vgg_jax.weights.tensor_file import open_tensor_file

DESCRIPTION = "description"
BLOCK_BYTES = 2**25  # of features that are in memory at once, at most, unless one image has more
MOST_ROWS = 1024  # of a block, which is a row group of a .parquet file
KIND = "vgg_jax embeddings"


@dataclasses.dataclass
class Embeddings:
    """The features of images: the result of `embeddings`, or read from a file that `vgg-jax extract` wrote.

    Attributes:
      features: from each layer to (N, C') float32, or to (N, H', W', C') for maps.
      names: the N names of the images.
      labels: (N,) int32 classes or (N, K) float32; None if the images have none.
      description: layers, view (pool, scales and the other options), preprocessing, weights (their hash), network,
        images (their hash), class_names and more, as JSON values.
    """

    features: dict[str, np.ndarray]
    names: list[str]
    labels: np.ndarray | None
    description: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; () if they are unknown."""
        return tuple(self.description["class_names"])


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds: the features, and a description of them."""

    features: Features
    labels: np.ndarray | None
    description: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        """Return the names of the layers."""
        return list(self.description["layers"])

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the shape of the features of all images."""
        return (len(self.features), *self.features.block(layer, 0, 1).shape[1:])

    def blocks(self, *layers: str) -> Iterator[list[np.ndarray]]:
        """Yield the features of consecutive images, for each of the layers, as little-endian arrays."""
        row = sum(4 * int(np.prod(self.shape(layer)[1:])) for layer in layers)
        step = min(MOST_ROWS, max(1, BLOCK_BYTES // row))
        for start in range(0, len(self.features), step):
            stop = min(start + step, len(self.features))
            yield [np.ascontiguousarray(self.features.block(layer, start, stop), "<f4") for layer in layers]

    def describe(self) -> str:
        """Return the description as JSON."""
        return json.dumps(self.description, sort_keys=True)


def check_path(path: str) -> None:
    """Raise UserError if a file of features cannot have this name, or its library is missing."""
    suffix = os.path.splitext(path)[1]
    if suffix not in FORMATS:
        raise UserError(
            f"{path} ends in {suffix or 'no suffix'}; expected one of {', '.join(FORMATS)}: rename the output"
        )
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; expected a file: choose another output")
    if suffix == ".parquet":
        require("pyarrow", "extract")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is missing or cannot be written; expected a folder: create it, or choose another")


def write_embeddings(path: str, content: Content) -> None:
    """Write a file of features, which appears complete or not at all; equal content gives equal bytes.

    Args:
      path: the file, whose suffix decides its format.
      content: the features.

    Raises:
      UserError: if it cannot be written.
    """
    write, _, _ = FORMATS[os.path.splitext(path)[1]]
    try:
        write(path + ".partial", content)
        with open(path + ".partial", "rb") as file:
            os.fsync(file.fileno())
        os.replace(path + ".partial", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".partial")
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free disk space, then rerun to resume"
        ) from None


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Return the features in a file that `vgg-jax extract` wrote.

    Args:
      path: the file: .npz, .safetensors or .parquet.

    Returns:
      All of the file's features, names and labels, in memory.

    Raises:
      UserError: if the file is missing, damaged or not of that kind, or pyarrow is missing for a .parquet file.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; expected a file of vgg-jax extract: correct the path")
    description = read_description(path)
    _, _, read = FORMATS[os.path.splitext(path)[1]]
    with _damage_of(path):
        return read(path, description)


def read_description(path: str) -> dict[str, Any]:
    """Return the description in a file of features.

    Raises:
      UserError: if the file is not of that kind.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in FORMATS:
        raise UserError(f"{path} is no file of features; expected one of {', '.join(FORMATS)}: run vgg-jax extract")
    if suffix == ".parquet":
        require("pyarrow", "extract")
    with _damage_of(path):
        description = dict(json.loads(FORMATS[suffix][1](path)))
        if description["kind"] != KIND:
            raise ValueError("it has another description")
        return description


@contextlib.contextmanager
def _damage_of(path: str) -> Iterator[None]:
    """Raise UserError if the body cannot read a file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:  # pyarrow's are ValueErrors
        raise UserError(
            f"{path} is damaged or was not written by vgg-jax extract: {error}; expected such a file: extract again"
        ) from None


def _write_npz(path: str, content: Content) -> None:
    """Write an uncompressed .npz file as `np.savez` does, without holding the features in memory."""
    arrays = {"names": np.array(content.features.names()), DESCRIPTION: np.array(content.describe())}
    if content.labels is not None:
        arrays["labels"] = content.labels
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        for layer in content.layers:
            with archive.open(zipfile.ZipInfo(f"{layer}.npy"), "w", force_zip64=True) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": content.shape(layer)}
                np.lib.format.write_array_header_2_0(file, header)
                _write_blocks(file, content, layer)


def _npz_description(path: str) -> str:
    with np.load(path, allow_pickle=False) as file:
        return str(file[DESCRIPTION])


def _read_npz(path: str, description: dict[str, Any]) -> Embeddings:
    with np.load(path, allow_pickle=False) as file:
        labels = file.get("labels")
        return Embeddings(
            {layer: file[layer] for layer in description["layers"]}, file["names"].tolist(), labels, description
        )


def _write_safetensors(path: str, content: Content) -> None:
    """Write a .safetensors file. It has no strings, so `names` is a JSON list in UTF-8, as numbers."""
    names = np.frombuffer(json.dumps(content.features.names()).encode(), np.uint8)
    first = {"names": names, **({} if content.labels is None else {"labels": content.labels})}
    header: dict[str, Any] = {"__metadata__": {DESCRIPTION: content.describe()}}
    place = 0
    entries = [(layer, "F32", content.shape(layer)) for layer in content.layers]  # first: they stay aligned
    types = {"uint8": "U8", "int32": "I32", "float32": "F32"}
    entries += [(name, types[array.dtype.name], array.shape) for name, array in reversed(first.items())]
    for name, dtype, shape in entries:
        end = place + int(np.prod(shape)) * (1 if dtype == "U8" else 4)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for layer in content.layers:
            _write_blocks(file, content, layer)
        for _, array in reversed(first.items()):
            file.write(array.tobytes())


def _safetensors_description(path: str) -> str:
    return open_tensor_file(path).metadata[DESCRIPTION]


def _read_safetensors(path: str, description: dict[str, Any]) -> Embeddings:
    arrays = open_tensor_file(path).arrays
    names = json.loads(arrays["names"].tobytes())
    features = {layer: np.array(arrays[layer]) for layer in description["layers"]}
    return Embeddings(features, names, np.array(arrays["labels"]) if "labels" in arrays else None, description)


def _write_parquet(path: str, content: Content) -> None:
    """Write a .parquet file: the columns name, label and one of lists for each layer."""
    pa, parquet = require("pyarrow", "extract"), require("pyarrow.parquet", "extract")
    names, labels, start = content.features.names(), content.labels, 0
    fields = [("name", pa.string())]
    if labels is not None:
        fields.append(("label", pa.int32() if labels.ndim == 1 else pa.list_(pa.float32(), labels.shape[1])))
    fields += [(layer, pa.list_(pa.float32(), int(np.prod(content.shape(layer)[1:])))) for layer in content.layers]
    schema = pa.schema(fields, metadata={DESCRIPTION: content.describe()})
    # Floats of features hardly repeat: a dictionary of them costs time and space.
    options = {"use_dictionary": False, "compression": "none"}
    with parquet.ParquetWriter(path, schema, **options) as writer:
        for block in content.blocks(*content.layers):
            stop = start + len(block[0])
            columns = [pa.array(names[start:stop], pa.string())]
            if labels is not None:
                columns.append(_column(pa, labels[start:stop]))
            columns += [_column(pa, values.reshape(len(values), -1)) for values in block]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=MOST_ROWS)
            start = stop


def _column(pa: Any, values: np.ndarray) -> Any:
    """Return a column of numbers, or of lists of equal length."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _parquet_description(path: str) -> str:
    metadata = require("pyarrow.parquet", "extract").read_schema(path).metadata or {}
    return bytes(metadata[DESCRIPTION.encode()]).decode()


def _read_parquet(path: str, description: dict[str, Any]) -> Embeddings:
    table = require("pyarrow.parquet", "extract").read_table(path)

    def numbers(name: str, shape: list[int]) -> np.ndarray:
        column = table.column(name).combine_chunks()
        values: np.ndarray = (column.flatten() if shape else column).to_numpy()
        return values.reshape(len(table), *shape)

    features = {layer: numbers(layer, description["shapes"][layer]) for layer in description["layers"]}
    labels = numbers("label", description["label_shape"]) if "label" in table.column_names else None
    return Embeddings(features, table.column("name").to_pylist(), labels, description)


def _write_blocks(file: Any, content: Content, layer: str) -> None:
    for (values,) in content.blocks(layer):
        file.write(values.tobytes())


Writer: TypeAlias = Callable[[str, Content], None]
Describer: TypeAlias = Callable[[str], str]
FORMATS: dict[str, tuple[Writer, Describer, Callable[[str, dict[str, Any]], Embeddings]]] = {
    ".npz": (_write_npz, _npz_description, _read_npz),
    ".safetensors": (_write_safetensors, _safetensors_description, _read_safetensors),
    ".parquet": (_write_parquet, _parquet_description, _read_parquet),
}
