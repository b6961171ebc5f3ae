"""Images in folders, root/split/class/image, the layout of torchvision's `ImageFolder` and TFDS's."""

import os
from collections.abc import Sequence
from typing import Any

from vgg_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderRecords(Sequence[dict[str, Any]]):
    """The images of one split in the order of their paths: `image`, the bytes of the file, and `label`."""

    def __init__(self, root: str, split: str, class_split: str) -> None:
        """List the images of a split.

        Args:
          root: directory with one folder for each split.
          split: folder to list.
          class_split: folder that defines the classes, in the order of their names.

        Raises:
          UserError: if a split is missing, if the split has no image, or if it has a class that `class_split` lacks.
        """
        splits = _folders(root) if os.path.isdir(root) else []
        for name in (split, class_split):
            if name not in splits:
                raise UserError(f"{root} has no folder {name!r}; found {', '.join(splits) or 'none'}")
        self.classes = _folders(os.path.join(root, class_split))
        directory = os.path.join(root, split)
        found = _folders(directory)
        if unknown := sorted(set(found) - set(self.classes)):
            raise UserError(f"{directory} has classes that {class_split} lacks: {', '.join(unknown)}")
        self._examples = [
            (path, self.classes.index(name))
            for name in found
            for path in sorted(entry.path for entry in os.scandir(os.path.join(directory, name)) if entry.is_file())
            if path.lower().endswith(SUFFIXES)
        ]
        if not self._examples:
            raise UserError(f"{directory} has no images; expected CLASS/IMAGE with one of {', '.join(SUFFIXES)}")

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
        """Return the path of an image."""
        return self._examples[index][0]


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
