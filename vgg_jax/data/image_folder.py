"""Images in folders: root/split/class/image, the layout of torchvision's `ImageFolder` and TFDS's, or root/class/image.

Subfolders of a class belong to it. Names are compared in Unicode's form NFC. A split may be a part in the notation of
TFDS, such as `train[:80%]`; see `slices`.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from vgg_jax.data import listing, slices
from vgg_jax.errors import UserError

WHOLE = ("train", "all")  # names of the only split of root/class/image
EVALUATION = ("test", "val", "validation", "valid", "eval", "dev")
CONVENTIONAL = ("train", "training", *EVALUATION, "testing")


class Example(NamedTuple):
    """An image of a folder: its path, its class, and CLASS/IMAGE in Unicode's form NFC, its name in slices."""

    path: str
    label: int
    key: str


class FolderRecords(Sequence[dict[str, Any]]):
    """The images of one split in the order of their paths: `image`, the bytes of the file, and `label`."""

    def __init__(self, root: str, split: str, class_split: str) -> None:
        """List the images of a split. `notes` receives one line for each assumption, and one for the skipped files.

        Args:
          root: directory with one folder for each split, or for each class.
          split: split to list, or a slice such as `train[:80%]`.
          class_split: split that defines the classes, in the order of their names.

        Raises:
          UserError: if a split is missing, if the split has no image, if it has a class that `class_split` lacks, or if
            a class has no image.
        """
        if not os.path.isdir(root):
            problem = "is a file" if os.path.exists(root) else "does not exist"
            raise UserError(
                f"{root} {problem}; expected a directory with SPLIT/CLASS/IMAGE or of TFDS; correct the path"
            )
        self.notes: list[str] = []
        parts, class_parts = (_parts(root, name) for name in (split, class_split))
        directories = [_split_directory(root, part.name) for part in parts]
        found = {name for part in class_parts for name in _class_folders(_split_directory(root, part.name))}
        self.classes = sorted(found)
        self._examples: list[Example] = []
        for part, directory in zip(parts, directories, strict=True):
            if directory == root:
                names = listing.shortened(self.classes)
                self.notes.append(f"{root} has no split folders; its {len(self.classes)} folders are classes: {names}")
            examples = self._list(directory, class_split)
            self._examples += [examples[i] for i in part.select([example.key for example in examples])]
        if not self._examples:
            raise UserError(f"{split!r} of {root} is empty; choose a larger part")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        path, label, _ = self._examples[index]
        try:
            with open(path, "rb") as file:
                return {"image": file.read(), "label": label}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    @property
    def labels(self) -> list[int]:
        """Return the labels of all images, without reading the files."""
        return [example.label for example in self._examples]

    def locate(self, index: int) -> str:
        """Return the path of an image."""
        return self._examples[index].path

    def key(self, index: int) -> str:
        """Return CLASS/IMAGE, the name of an image in its split."""
        return self._examples[index].key

    def _list(self, directory: str, class_split: str) -> list[Example]:
        """Return the images of a split's directory, and note what is skipped."""
        folders = _class_folders(directory)
        if unknown := sorted(folders.keys() - set(self.classes)):
            raise UserError(f"{directory} has classes that {class_split} lacks: {listing.shortened(unknown)}")
        skipped = listing.Skipped()
        listing.skip_outside_folders(directory, skipped)
        examples: list[Example] = []
        empty = []
        for name in sorted(folders):
            label, before = self.classes.index(name), len(examples)
            for folder in folders[name]:
                for path in listing.list_images(folder, skipped):
                    key = listing.normal(f"{name}/{os.path.relpath(path, folder)}")
                    examples.append(Example(path, label, key))
            if len(examples) == before:
                empty.append(name)
            if len(folders[name]) > 1:
                self.notes.append(
                    f"{directory}: {len(folders[name])} folders are the class {name} (Unicode NFC and NFD)"
                )
        reason = f" ({skipped})" if skipped else ""
        if not examples:
            raise UserError(
                f"{directory} has no images; expected CLASS/IMAGE with files such as .jpg, .png or .webp{reason}"
            )
        if empty:
            raise UserError(
                f"{directory} has no image of {listing.shortened(empty)}; expected images in each class folder; "
                f"add images or remove the folder{reason}"
            )
        if skipped:
            self.notes.append(f"{directory}: {skipped}")
        return examples


def has_only_split(dataset: str, split: str, train_split: str) -> bool:
    """Return whether a directory of images has the folder of a split, and none of the training split."""
    root = os.path.expanduser(dataset)
    folders = _folders(root) if os.path.isdir(root) else []
    return split in folders and not any(part.name in folders for part in _parts(root, train_split))


def split_names(root: str) -> list[str]:
    """Return the names of the splits of a directory of images; ["all"] if its folders are classes."""
    try:
        if _split_directory(root, "all") == root:
            return ["all"]
    except UserError:  # there is no split of this name
        pass
    return _folders(root)


def _parts(root: str, split: str) -> list[slices.Part]:
    """Return the parts of a split; a folder of this very name is one."""
    return [slices.Part(split)] if split in _folders(root) else slices.parse(split)


def _split_directory(root: str, name: str) -> str:
    """Return the directory of the class folders of a split: the root itself if it has no split folders.

    Raises:
      UserError: if there is no such split.
    """
    folders = _folders(root)
    conventional = [folder for folder in folders if folder.lower() in CONVENTIONAL]
    for folder in folders:
        if listing.normal(folder) == listing.normal(name) and _folders(os.path.join(root, folder)):
            return os.path.join(root, folder)
    # Folders with images of their own are classes, unless they are named as splits.
    has_classes = any(listing.has_image(os.path.join(root, folder)) for folder in folders)
    if has_classes and len(conventional) < 2 and not any(_folders(os.path.join(root, c)) for c in conventional):
        if name in WHOLE:
            return root
        raise UserError(
            f"{root} has no split {name!r}: its folders {listing.shortened(folders)} hold images; expected "
            "SPLIT/CLASS/IMAGE, or parts of the whole: set config.data.train_split='train[:80%]' and "
            "config.data.eval_split='train[80%:]'"
        )
    if name in folders:
        raise UserError(f"{root}/{name} has no class folders; expected {name}/CLASS/IMAGE; move its images into them")
    layout = "" if folders else "; expected SPLIT/CLASS/IMAGE or CLASS/IMAGE"
    raise UserError(
        f"{root} has no folder {name!r}; found {listing.shortened(folders) or 'none'}{layout}{remedy(name, folders)}"
    )


def remedy(split: str, found: Sequence[str]) -> str:
    """Return the end of a message about a missing split: the field to set, and if one is meant, its value."""
    field = "eval_split" if split in EVALUATION else "train_split" if split in WHOLE else "eval_split or train_split"
    kin = EVALUATION if split in EVALUATION else CONVENTIONAL[:2]
    meant = [name for name in found if name.lower() in kin and split in kin]
    if meant:
        return f"; did you mean {meant[0]}? Set config.data.{field}={meant[0]}, or --split {meant[0]}"
    if field == "eval_split" and (whole := [name for name in found if name.lower() in ("training", *WHOLE)]):
        parts = f"config.data.train_split='{whole[0]}[:80%]' and config.data.eval_split='{whole[0]}[80%:]'"
        return f"; set config.data.eval_split, or --split, to one of them, or use parts: set {parts}"
    return f"; set config.data.{field}, or --split, to one of them" if found else ""


def _class_folders(directory: str) -> dict[str, list[str]]:
    """Return the folders of each class; names that are equal in Unicode's form NFC are one class."""
    found: dict[str, list[str]] = {}
    for name in _folders(directory):
        found.setdefault(listing.normal(name), []).append(os.path.join(directory, name))
    return found


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not listing.is_litter(entry.name))
