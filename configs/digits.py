"""VGG-11 with batch norm on scikit-learn's handwritten digits: real images, no download, minutes on a CPU.

Source: our own recipe; the data set is scikit-learn's (vgg_jax/data/prepare/digits.py). There are no horizontal flips,
because a flipped digit is another shape.
Command: python train.py --config configs/digits.py
Cost: 157 s on 2 cores of an Intel Xeon with AVX-512 and AMX.
Result: 99.44 % of the 360 held-out images (docs/training.md); experiments/learning.md has the other columns of the
paper (--config.model.depth=16 and so on).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of VGG-11 with batch norm on the digits."""
    return Config(
        model=ModelConfig(depth=11),
        data=DataConfig(dataset="digits", flip=False, mean=(0.3057,), std=(0.3235,)),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_epochs=1),
        batch_size=64,
        num_epochs=12,
        log_every_steps=11,
    )
