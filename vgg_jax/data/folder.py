"""Images in folders, root/split/class/image, as torchvision's `ImageFolder` and TFDS's have them."""

import os
from collections.abc import Sequence
from typing import Any

from vgg_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderRecords(Sequence[dict[str, Any]]):
    """The images of one split, in the order of their paths: `image`, the file's bytes, and `label`."""

    def __init__(self, root: str, split: str, train_split: str) -> None:
        """Lists the split; the classes are those of the training split, in the order of their names.

        Raises:
          UserError: where a split is missing, the split has no image, or a class that the training split has not.
        """
        splits = _folders(root) if os.path.isdir(root) else []
        for name in (split, train_split):
            if name not in splits:
                raise UserError(f"{root} has no folder {name!r}; found {', '.join(splits) or 'none'}")
        self.classes = _folders(os.path.join(root, train_split))
        found = _folders(os.path.join(root, split))
        if strangers := sorted(set(found) - set(self.classes)):
            raise UserError(
                f"{os.path.join(root, split)} has classes that {train_split} has not: {', '.join(strangers)}"
            )
        self._examples = [
            (path, self.classes.index(name))
            for name in found
            for path in sorted(entry.path for entry in os.scandir(os.path.join(root, split, name)) if entry.is_file())
            if path.lower().endswith(SUFFIXES)
        ]
        if not self._examples:
            raise UserError(f"{os.path.join(root, split)} has no images; expected CLASS/IMAGE, as {SUFFIXES}")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        path, label = self._examples[index]
        try:
            with open(path, "rb") as file:
                return {"image": file.read(), "label": label}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def locate(self, index: int) -> str:
        """The path of an image."""
        return self._examples[index][0]


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
