"""VGG without batch norm on the embedded handwritten digits: the recipe under which every column of the paper learns.

Source: our own recipe. From torchvision's initialisation a plain VGG sees a gradient near zero for its first epochs;
when it lets go, one large step can kill it for good. The warm-up and the clipped gradient prevent that.
Command: python train.py --config configs/digits_plain.py --config.model.depth=16
Cost and result: benchmarks/learning.md.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=16, batch_norm=False),
        data=DataConfig(dataset="digits", flip=False, mean=(0.3057,), std=(0.3235,)),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_epochs=1, clip_norm=1.0),
        batch_size=32,
        num_epochs=20,
        log_every_steps=22,
    )
