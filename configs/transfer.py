"""Transfer: ImageNet's VGG-16 with a new head on CIFAR-10; its features stay as they are, the head learns with Adam.

Source: the usual recipe of transfer-learning tutorials; the head is 4096, 1024 and one output for each class.
Unlike the tutorials, GPU and TPU compute in bfloat16, for speed; --config.model.dtype=float32 follows them.
Command: python train.py --config configs/transfer.py
Cost: not yet measured; each step is the forward pass at 224x224, and the head.
Result: not yet measured. For a transfer that needs no download, see configs/digits_transfer.py.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.preprocess import IMAGENET


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, pool_size=7, hidden=(4096, 1024), dtype="auto"),
        data=DataConfig(image_size=224, resize=224, pad=0, mean=IMAGENET.mean, std=IMAGENET.std),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant"),
        init_from="vgg16",
        freeze=("features",),
        batch_size=64,
        num_epochs=10,
    )
