"""VGG-11 with batch norm on the embedded handwritten digits."""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=11),
        data=DataConfig(dataset="digits", flip=False, mean=(0.3,), std=(0.35,)),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_epochs=1),
        batch_size=64,
        num_epochs=12,
        log_every_steps=11,
    )
