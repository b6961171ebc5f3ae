"""VGG without batch norm on the embedded handwritten digits."""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=16, batch_norm=False),
        data=DataConfig(dataset="digits", flip=False, mean=(0.3,), std=(0.35,)),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_epochs=1),
        batch_size=32,
        num_epochs=15,
        log_every_steps=11,
    )
