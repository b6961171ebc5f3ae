"""Transfer learning: ImageNet's VGG-16 with frozen features and a new head on CIFAR-10, trained by Adam.

Source: the common recipe of transfer-learning tutorials; the head has 4096, 1024 and one output for each class.
Unlike the tutorials, GPU and TPU compute in bfloat16 for speed (mixed precision); --config.model.dtype=float32 follows
the tutorials.
Command: python train.py --config configs/transfer.py
Cost: open, see docs/benchmarks.md; a step is the forward pass at 224x224 and the training of the head.
Result: open, see docs/benchmarks.md; configs/digits_transfer.py is a transfer that needs no download.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import IMAGENET


def get_config() -> Config:
    """Return the configuration of a new head on ImageNet's VGG-16, on CIFAR-10."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, pool_size=7, hidden=(4096, 1024), dtype="auto"),
        data=DataConfig(image_size=224, resize=224, pad=0, mean=IMAGENET.mean, std=IMAGENET.std),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant"),
        init_from="vgg16",
        freeze=("features",),
        batch_size=64,
        num_epochs=10,
    )
