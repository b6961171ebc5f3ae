"""The files of `torch.save`: read without executing anything, and written."""

import argparse
import collections
import contextlib
import io
import pickletools
import stat
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from vgg_jax.errors import UserError, first_line, require
from vgg_jax.weights.contents import ZIP_ERRORS, is_zip
from vgg_jax.weights.metadata import attach_to

LARGEST = 4 * 2**30  # bytes of one file's arrays: a VGG-19 in float64 has 1.15 GB
LARGEST_PICKLE = 2 * 2**20  # bytes of names and numbers; of a VGG they are 20 thousand, with an optimizer's state 100
REMEDY = "torch.save(model.state_dict(), path)"
# The parts of a state dict that are no tensors of their own; torch.load reads these.
HARMLESS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.storage.", "torch.serialization.")
HARMLESS_NAMES = {
    "argparse.Namespace",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "_codecs.encode",
}
HARMLESS_NAMES |= {f"{module}.{name}" for module in ("__builtin__", "builtins") for name in ("set", "bytearray")}


def read_content(path: str) -> Any:
    """Return what `torch.load` reads from a file: tensors, numbers, text, and containers of these.

    Raises:
      UserError: if torch is missing or too old, or the file is damaged, far larger than a checkpoint's, or holds
        objects of other types; the message names the first of these types. Nothing in the file is executed.
    """
    torch = import_torch()
    _check_archive(path)
    names = _global_names(path)
    try:
        # timm and torchvision's references save the options of the command; a Namespace only holds attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        strangers = [name for name in names if not _is_harmless(name)]
        if not strangers:
            reason = first_line(error).split("weights_only")[0]
            raise UserError(f"refused by torch.load, which executes nothing: {reason}") from None
        whole = any(name.startswith("torch.nn.modules.") for name in names)
        leaf = strangers[0].rpartition(".")[2]
        holds = f"a call of {strangers[0]}" if leaf[:1].islower() else f"an object of type {strangers[0]}"
        if strangers[0].startswith("numpy."):
            holds = f"a NumPy number or array ({strangers[0]})"
        if whole:
            holds = f"a whole pickled module ({strangers[0]})"
        raise UserError(
            f"holds {holds}; expected only tensors, numbers and text, because reading executes nothing; in the "
            f"program that wrote it, save {REMEDY} instead"
        ) from None


def write_tensors(path: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a state dict as `torch.save` does, with strings that PyTorch ignores."""
    torch = import_torch()
    tensors: collections.OrderedDict[str, Any] = collections.OrderedDict()
    for name, array in arrays.items():
        is_bfloat16 = array.dtype.name == "bfloat16"
        tensor = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
        tensors[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
    attach_to(tensors, metadata)
    torch.save(tensors, path)


def import_torch() -> Any:
    """Return the module torch; raise UserError if it is missing or can be made to execute a file's content."""
    torch = require("torch", "torch")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UserError(
            f"PyTorch {torch.__version__} can be made to execute the content of a .pth file (CVE-2026-24747); "
            "expected 2.10 or newer: pip install -U torch"
        )
    return torch


def _check_archive(path: str) -> None:
    """Raise UserError if the file is a zip archive that torch.save cannot have written."""
    if not is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except ZIP_ERRORS as error:
        raise UserError(f"not a whole archive: {error}") from None
    size = sum(member.file_size for member in members)
    # torch.save stores without compression, so a compressed member is not its work and may be a decompression bomb.
    if size > LARGEST or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"an archive of {size:,} bytes, some compressed; expected one that torch.save wrote")
    for member in members:
        outside = member.filename.startswith("/") or ".." in member.filename.split("/")
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"an archive with {member.filename!r}, a link or a path outside; expected torch.save's")


def _global_names(path: str) -> list[str]:
    """Return the types and functions that a file's pickles name, without executing the pickles."""
    names: list[str] = []
    for stream in _pickles(path):
        try:
            names += _globals_of(stream)
        except UserError:
            raise
        except (ValueError, EOFError, OverflowError, MemoryError):  # torch.load names the damage
            break
    return list(dict.fromkeys(names))


def _pickles(path: str) -> Iterator[io.BufferedIOBase]:
    """Yield the pickles of a file of torch.save; the old form has four of them, one after the other."""
    if not is_zip(path):
        with open(path, "rb") as file:
            for _ in range(4):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                _check_size(member.file_size)
                # torch.load names the damage if the member cannot be read.
                with contextlib.suppress(*ZIP_ERRORS, RuntimeError):
                    content = archive.read(member)
                    yield io.BytesIO(content)


def _globals_of(stream: Any) -> Iterator[str]:
    """Yield the names in the next pickle of a stream; raise UserError if it is far larger than a checkpoint's."""
    start, texts = stream.tell(), [""] * 2
    memo: dict[Any, str] = {}
    for opcode, argument, position in pickletools.genops(stream):
        if (position or 0) - start > LARGEST_PICKLE:
            _check_size(position or 0)
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1]
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = texts[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts = [texts[-1], memo.get(argument, "")]
        elif isinstance(argument, str):
            texts = [texts[-1], argument[:200]]


def _check_size(size: int) -> None:
    if size > LARGEST_PICKLE:
        raise UserError(
            f"holds more than {LARGEST_PICKLE:,} bytes of names and numbers beside the tensors; expected a state dict: "
            f"save {REMEDY}"
        )


def _is_harmless(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return name in HARMLESS_NAMES or name.startswith(HARMLESS) or (module == "torch" and leaf[:1] != "_")
