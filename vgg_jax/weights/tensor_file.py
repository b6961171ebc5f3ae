"""Arrays of a .safetensors file as views of the file, which is read page by page when it is copied."""

import json
import mmap
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from vgg_jax.errors import UserError

LARGEST_HEADER = 4 * 2**20  # bytes of a .safetensors file's header; of a VGG-19 it is 10 thousand
# NumPy's dtype of each name in a header; the arrays of other dtypes are read by the library.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip


class TensorFile(NamedTuple):
    """The content of a .safetensors file."""

    arrays: dict[str, np.ndarray]  # read-only views of the file
    metadata: dict[str, str]
    forget: Callable[[], None]  # removes the pages that have been read from the process; the views stay valid


def open_tensor_file(path: str) -> TensorFile:
    """Map a .safetensors file into memory; read the header only.

    Args:
      path: the file, which must not change while the arrays are in use.

    Raises:
      UserError: if the file is damaged or its header is too long.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise UserError(
                    f"not a whole .safetensors file: a header of {length:,} bytes; expected {LARGEST_HEADER:,}"
                )
            with safetensors.safe_open(path, "np") as checked:  # checks the header and the length of the file
                metadata = checked.metadata() or {}
                names = list(checked.keys())
                header = json.loads(file.read(length))
                others = {name: checked.get_tensor(name) for name in names if header[name]["dtype"] not in DTYPES}
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (safetensors.SafetensorError, OSError, MemoryError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a whole .safetensors file: {error}") from None

    def view(name: str) -> np.ndarray:
        entry = header[name]
        start, end = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        flat = np.frombuffer(content, dtype, (end - start) // dtype.itemsize, 8 + length + start)
        return flat.reshape(entry["shape"])

    def forget() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            content.madvise(mmap.MADV_DONTNEED)

    return TensorFile({name: others[name] if name in others else view(name) for name in names}, metadata, forget)
