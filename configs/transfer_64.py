"""Transfer learning in minutes: frozen ImageNet features at 64x64, computed once, and a new head on CIFAR-10.

Source: the head of transfer-learning tutorials, 4096, 1024 and one output for each class (Adam, 1e-3), on the paper
authors' convolutions. The features of each view and of its horizontal flip are cached on disk, so only the head trains.
Command: python train.py --config configs/transfer_64.py
Cost: one forward pass of each image and of its flip, then 0.6 s an epoch of 50,000 images (H100, bfloat16).
Result: 74.3 % of the test images of a JPEG copy of CIFAR-10, mean of three seeds; 72.3 % with 1,000, 61.0 % with 100
and 48.5 % with 10 images of each class (docs/transfer.md).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import AUTHORS


def get_config() -> Config:
    """Return the configuration of a new head on cached features of CIFAR-10 at 64x64."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, pool_size=2, hidden=(4096, 1024), dtype="auto"),
        data=DataConfig(image_size=64, resize=64, pad=0, mean=AUTHORS.mean[::-1], std=AUTHORS.std),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant"),
        init_from="vgg16_caffe",
        freeze=("features",),
        cache_features=True,
        batch_size=64,
        num_epochs=10,
    )
