"""ImageNet by torchvision's reference recipe: VGG-16 with batch norm, or plain with --config.model.batch_norm=False.

Source: torchvision's references/classification, with which its VGG weights were trained: batch 8 x 32, 90 epochs, SGD
with momentum 0.9, weight decay 1e-4, learning rate 0.1 with batch norm and 0.01 without
(--config.optimizer.learning_rate=0.01), divided by 10 every 30 epochs; random resized crops, horizontal flips. The
learning rate is proportional to the batch size (linear scaling: P. Goyal et al., arXiv:1706.02677). Unlike the recipe,
GPU and TPU compute in bfloat16 for speed (mixed precision); --config.model.dtype=float32 follows the recipe.
Command: python train.py --config configs/imagenet.py
Cost: open, see docs/benchmarks.md.
Result: open, see docs/benchmarks.md; torchvision publishes 73.36 % top-1 with batch norm, 71.59 % without.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import IMAGENET


def get_config() -> Config:
    """Return the configuration of torchvision's recipe on ImageNet."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=True, num_classes=1000, pool_size=7, hidden=(4096, 4096), dtype="auto"),
        data=DataConfig(
            dataset="imagenet2012",
            eval_split="validation",
            image_size=224,
            resize=256,
            train_view="random_resized_crop",
            mean=IMAGENET.mean,
            std=IMAGENET.std,
        ),
        optimizer=OptimizerConfig(
            learning_rate=0.1, reference_batch_size=256, weight_decay=1e-4, schedule="step", step_epochs=(30, 60)
        ),
        batch_size=256,
        num_epochs=90,
    )
