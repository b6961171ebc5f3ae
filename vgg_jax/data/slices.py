"""Parts of splits in the notation of TFDS, such as `train[:80%]` and `train+validation`, for folders of images."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from vgg_jax.errors import UserError

_PART = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<start>-?\d+%?|-?\d+\.\d+%)?:(?P<stop>-?\d+%?|-?\d+\.\d+%)?\])?")


class Part(NamedTuple):
    """A part of a split: its name and the two boundaries, each a number, a percentage or None."""

    name: str
    start: str | None = None
    stop: str | None = None

    def select(self, keys: Sequence[str]) -> list[int]:
        """Return the indices of the part, in rising order.

        A part is cut from an order in which the classes are mixed: that of the SHA-256 of each key. Therefore two parts
        that share no positions share no images, and another image beside them hardly changes a part.

        Args:
          keys: the images of the split, as CLASS/IMAGE.

        Raises:
          UserError: if a boundary exceeds the number of images.
        """
        if self.start is None and self.stop is None:
            return list(range(len(keys)))
        order = sorted(
            range(len(keys)), key=lambda i: hashlib.sha256(keys[i].encode(errors="surrogateescape")).digest()
        )
        start = 0 if self.start is None else _position(self.start, len(keys))
        stop = len(keys) if self.stop is None else _position(self.stop, len(keys))
        return sorted(order[start:stop])


def parse(split: str) -> list[Part]:
    """Return the parts that a split is the sum of.

    Args:
      split: a name, with a slice such as `train[:80%]` or `train[100:]`, or several of them joined by `+`.

    Raises:
      UserError: if the split has another form.
    """
    parts = []
    for text in split.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"split {split!r} is not a name or a part; expected such as train, train[:80%] or train[100:]"
            )
        parts.append(Part(match["name"], match["start"], match["stop"]))
    return parts


def _position(place: str, length: int) -> int:
    """Return the index of a boundary, rounded as by TFDS.

    Raises:
      UserError: if it exceeds the length.
    """
    index = round(float(place[:-1]) * length / 100) if place.endswith("%") else int(place)
    if abs(index) > length:
        raise UserError(f"the boundary {place} of a split exceeds its {length} images; choose a smaller one")
    return index + length if index < 0 else index
