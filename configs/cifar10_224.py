"""CIFAR-10 resized to 224x224 for the original VGG-16, as PyTorch tutorials train it.

Source: the common tutorial recipe: SGD with momentum 0.9, learning rate 0.01 divided by 10 every 30 epochs, weight
decay 5e-4, batch 32, random horizontal flips, hidden layers of 4096. Unlike the tutorials, GPU and TPU compute in
bfloat16 for speed (mixed precision); --config.model.dtype=float32 follows the tutorials.
Command: python train.py --config configs/cifar10_224.py
Cost: an image costs as much as one of ImageNet; meant for an accelerator.
Result: open, see docs/benchmarks.md.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of the original VGG-16 on CIFAR-10 at 224x224."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, pool_size=7, hidden=(4096, 4096), dtype="auto"),
        data=DataConfig(image_size=224, resize=224, pad=0),
        optimizer=OptimizerConfig(
            learning_rate=0.01, weight_decay=5e-4, schedule="step", step_epochs=(30, 60, 90), step_factor=0.1
        ),
        batch_size=32,
        eval_batch_size=128,
        num_epochs=100,
    )
