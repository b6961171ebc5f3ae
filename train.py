"""Train a VGG network.

    python train.py --config configs/vgg16.py [--workdir DIR] [--config.FIELD=VALUE ...]

Installed, `vgg-jax train` is the same command.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before JAX is imported; else XLA logs each cached program

from vgg_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
