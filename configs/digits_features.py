"""The source of configs/digits_transfer.py: VGG-11 with batch norm and the paper's kind of head on the digits 0 to 4.

Source: our own recipe. What keeps the features of use for other digits, as measured in benchmarks/transfer.md: fully
connected layers between them and the five classes, and few epochs; and four pools, which leave 2x2 positions.
Command: python train.py --config configs/digits_features.py
Cost and result: benchmarks/transfer.md.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4), pool_size=2, hidden=(4096, 1024)),
        data=DataConfig(dataset="digits", classes=(0, 1, 2, 3, 4), flip=False, mean=(0.3057,), std=(0.3235,)),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_epochs=1),
        batch_size=64,
        num_epochs=4,
        log_every_steps=11,
    )
