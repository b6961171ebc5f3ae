"""The records of a TFDS split in array_record files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vgg_jax.errors import UserError, first_line


class ArrayRecords:
    """The records of a split in array_record files, and the place of each."""

    def __init__(self, source: Any, files: Sequence[Any]) -> None:
        self._source, self.files = source, files
        self._ends = np.cumsum([file.examples_in_shard if file.take == -1 else file.take for file in files])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._source[index]
        except Exception as error:  # array_record raises several kinds; TFDS raises others if the bytes are no example
            raise UserError(
                f"{self.locate(index)} cannot be read, the file is damaged: {first_line(error)}; "
                "prepare the data set again, or copy the file from another machine"
            ) from None

    def locate(self, index: int) -> str:
        """Return the file of a record and the record's place in it."""
        i = int(np.searchsorted(self._ends, index, "right"))
        first = self._ends[i - 1] if i else 0
        return f"{self.files[i].filename}, record {self.files[i].skip + index - first}"
