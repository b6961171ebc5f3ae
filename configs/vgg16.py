"""VGG-16 (column D) with batch norm on CIFAR-10.

Source: SGD, momentum 0.9, weight decay 5e-4, cosine decay from 0.1, pad-4 crop and flip: what the PyTorch CIFAR-10
collections use. They publish, of test accuracy: 94.00 % (huyvnphan/PyTorch_CIFAR10),
92.64 % (kuangliu/pytorch-cifar).
Command: python train.py --config configs/vgg16.py
Cost: not yet measured.
Result: not yet measured.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=16),
        data=DataConfig(dataset="cifar10"),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_epochs=5),
        batch_size=128,
        num_epochs=200,
    )
