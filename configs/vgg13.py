"""VGG-13 (column B) with batch norm on CIFAR-10.

Source: SGD, momentum 0.9, weight decay 5e-4, cosine decay from 0.1, pad-4 crop and horizontal flip, as in the common
PyTorch CIFAR-10 collections. They publish this test accuracy: 94.22 % (huyvnphan/PyTorch_CIFAR10).
Command: python train.py --config configs/vgg13.py
Cost: open, see docs/benchmarks.md.
Result: open, see docs/benchmarks.md.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of VGG-13 on CIFAR-10."""
    return Config(
        model=ModelConfig(depth=13),
        data=DataConfig(dataset="cifar10"),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_epochs=5),
        batch_size=128,
        num_epochs=200,
    )
