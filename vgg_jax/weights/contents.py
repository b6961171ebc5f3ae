"""Descriptions of files that hold no weights, or weights of another kind, with the remedy."""

import contextlib
import os
import zipfile

MAGIC = {
    b"GGUF": ("a GGUF file of a language model", "expected a VGG's weights"),
    b"\x93NUMPY": ("a NumPy array (.npy)", "save the state dict with safetensors.numpy.save_file"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"BZh": ("a bzip2 archive", "unpack it first"),
    b"\xfd7zXZ": ("an xz archive", "unpack it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"%PDF": ("a PDF document", "download the file itself"),
    b"\x89PNG": ("a PNG image", "download the file itself"),
    b"\xff\xd8\xff": ("a JPEG image", "download the file itself"),
}
# NotImplementedError: a version of the format that Python does not read.
ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)
SSTABLE = bytes.fromhex("57fb808b247547db")  # the last bytes of TensorFlow's .index files and of its first checkpoints
EXPORT = "save its variables as .safetensors, or the network as Keras' .h5"


def describe_content(path: str) -> str | None:
    """Return what a file holds and what to do instead, such as `an empty file (0 bytes); download it again`.

    Args:
      path: a file.

    Returns:
      The description, or None if the content is unknown or cannot be read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(4096)
            file.seek(max(0, size - 8))
            tail = file.read(8)
    except OSError:
        return None
    if not size:
        return "an empty file (0 bytes); download it again"
    for magic, (kind, remedy) in MAGIC.items():
        if head.startswith(magic):
            return f"{kind} of {size:,} bytes; {remedy}"
    if head.startswith(b"PK\x03\x04"):
        return _describe_zip(path, size)
    if tail == SSTABLE:
        return f"a TensorFlow checkpoint of {size:,} bytes; {EXPORT}"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite network of {size:,} bytes; {EXPORT}"
    return _describe_text(head, size)


def is_zip(path: str) -> bool:
    """Return whether the file is a zip archive that Python reads."""
    with contextlib.suppress(*ZIP_ERRORS):
        return zipfile.is_zipfile(path)
    return False


def _describe_zip(path: str, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except ZIP_ERRORS:
        return None
    if any(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz) of {size:,} bytes; save the arrays with safetensors.numpy.save_file"
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return (
            f"a TorchScript archive of {size:,} bytes; save its state dict: "
            "torch.save(torch.jit.load(path).state_dict(), ...)"
        )
    if any(name.endswith("data.pkl") for name in names) or "model.weights.h5" in names:
        return None  # an archive of torch.save or Keras
    return f"a zip archive of {size:,} bytes with {', '.join(names[:3]) or 'nothing in it'}; unpack it first"


def _describe_text(head: bytes, size: int) -> str | None:
    for cut in range(4):  # a character may be cut at the end of `head`
        with contextlib.suppress(UnicodeDecodeError):
            text = head[: len(head) - cut].decode()
            break
    else:
        return None
    text = text.lstrip("\ufeff")
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    start = text.lstrip().lower()
    if start.startswith("version https://git-lfs"):
        return f"a text file of {size:,} bytes (a Git LFS pointer); download the file itself, as git lfs pull does"
    if start.startswith(("<!doctype", "<html", "<?xml", "<head")):
        return f"a text file of {size:,} bytes (an HTML page); download the file itself"
    if start.startswith("model_checkpoint_path"):
        return f"a text file of {size:,} bytes (the index of a TensorFlow checkpoint); {EXPORT}"
    kind = " (JSON)" if start.startswith(("{", "[")) else ""
    return f"a text file of {size:,} bytes{kind}; choose the file of the weights, or download it again"
