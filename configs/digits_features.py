"""The source of configs/digits_transfer.py: VGG-11 with batch norm and hidden layers, trained on the digits 0 to 4.

Source: our own recipe. Three choices keep the features useful for other digits, as measured in experiments/transfer.md:
fully connected layers between the features and the five classes, few epochs, and four max pools, which leave 2x2
positions.
Command: python train.py --config configs/digits_features.py
Cost: 4 epochs of the images of five digits, less than configs/digits.py.
Result: 98.89 % on the digits 0 to 4 (experiments/transfer.md).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of VGG-11 with hidden layers on the digits 0 to 4."""
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4), pool_size=2, hidden=(4096, 1024)),
        data=DataConfig(dataset="digits", classes=(0, 1, 2, 3, 4), flip=False, mean=(0.3057,), std=(0.3235,)),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_epochs=1),
        batch_size=64,
        num_epochs=4,
        log_every_steps=11,
    )
