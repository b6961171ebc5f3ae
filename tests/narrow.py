"""Networks with an eighth of the paper's channels, for tests of properties that do not depend on the width.

`python tests/narrow.py ARGUMENTS` runs `train.py ARGUMENTS` with such networks. A step takes a few milliseconds.
"""

import os
import pathlib
import sys

if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as train.py
    sys.path[0] = str(pathlib.Path(__file__).parent.parent)

from vgg_jax.model import TABLE_1

NARROW_TABLE = {
    column: tuple(tuple(width // 8 for width in stage) for stage in stages) for column, stages in TABLE_1.items()
}

if __name__ == "__main__":
    from vgg_jax.cli import train

    TABLE_1.update(NARROW_TABLE)
    sys.exit(train.main())
