"""Train a VGG network.

    python train.py --config configs/vgg16.py [--workdir DIR] [--config.FIELD=VALUE ...]

Installed, `vgg-jax train` is the same command.
"""

import os
import sys

from vgg_jax.platforms import log_level

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", log_level())  # before JAX is imported

from vgg_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
