"""Images in folders, root/split/class/image, as torchvision's `ImageFolder` and TFDS's have them."""

import os
from collections.abc import Sequence
from typing import Any

from vgg_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderRecords(Sequence[dict[str, Any]]):
    """The images of one split, in the order of their paths: `image`, the file's bytes, and `label`."""

    def __init__(self, root: str, split: str) -> None:
        """Lists the split; the classes are those of all splits together, in the order of their names.

        Raises:
          UserError: where the split is missing or has no image.
        """
        splits = _folders(root)
        if split not in splits:
            raise UserError(f"{root} has no folder {split!r}; found {', '.join(splits) or 'none'}")
        self.classes = sorted({name for each in splits for name in _folders(os.path.join(root, each))})
        self._examples = [
            (entry, self.classes.index(name))
            for name in _folders(os.path.join(root, split))
            for entry in sorted(entry.path for entry in os.scandir(os.path.join(root, split, name)))
            if entry.lower().endswith(SUFFIXES)
        ]
        if not self._examples:
            raise UserError(f"{os.path.join(root, split)} has no images; expected CLASS/IMAGE, as {SUFFIXES}")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        path, label = self._examples[index]
        with open(path, "rb") as file:
            return {"image": file.read(), "label": label}

    def locate(self, index: int) -> str:
        """The path of an image."""
        return self._examples[index][0]


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
