"""VGG-11 with batch norm on the embedded handwritten digits: real images, no download, minutes on a CPU.

Source: our own recipe; the data set is scikit-learn's (see vgg_jax/data/digits.py). No flips: digits have a hand.
Command: python train.py --config configs/digits.py
Cost: see the README.
Result: see the README; for the other columns (--config.model.depth=16 and so on), benchmarks/learning.md.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=11),
        data=DataConfig(dataset="digits", flip=False, mean=(0.3057,), std=(0.3235,)),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_epochs=1),
        batch_size=64,
        num_epochs=12,
        log_every_steps=11,
    )
