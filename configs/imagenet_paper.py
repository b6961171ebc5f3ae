r"""ImageNet as in the paper: column D, or the others with --config.model.depth (and lrn, conv1x1).

Source: K. Simonyan and A. Zisserman, arXiv 1409.1556, sections 2 and 3: batch 256, momentum 0.9, weight decay 5e-4,
dropout 0.5, learning rate 0.01, divided by 10 whenever the validation accuracy stops improving, three times; 74 epochs;
the mean color subtracted, no other scaling; crops of 224 at training scale S = 256, horizontal flips, color shift.
Column A starts from random weights, here torchvision's initialization (the paper's footnote: Glorot and Bengio's works
too). The deeper columns take A's first four convolutions and its fully connected layers:

  python train.py --config configs/imagenet_paper.py --workdir runs/A --config.model.depth=11
  python train.py --config configs/imagenet_paper.py --workdir runs/D --config.init_from=runs/A

S = 384 starts from the network at 256, at a learning rate of 0.001. Scale jitter is fine-tuned from S = 384:

  python train.py --config configs/imagenet_paper.py --workdir runs/D384 --config.init_from=runs/D \
    --config.init_layers="('features','head')" --config.optimizer.learning_rate=0.001 \
    --config.data.train_scale="(384,384)" --config.data.resize=384

and likewise from runs/D384 with --config.data.train_scale="(256,512)". Evaluate each network with
python -m vgg_jax evaluate --workdir runs/D --protocol all. Unlike the paper, GPU and TPU compute in bfloat16 for speed
(mixed precision); --config.model.dtype=float32 follows the paper.
Command: python train.py --config configs/imagenet_paper.py
Cost: open, see docs/benchmarks.md.
Result: open, see docs/benchmarks.md; the paper's figures are in vgg_jax/evaluation/published.py.
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.preprocessing import FEATURES


def get_config() -> Config:
    """Return the configuration of the paper's recipe on ImageNet."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, num_classes=1000, pool_size=7, hidden=(4096, 4096), dtype="auto"),
        data=DataConfig(
            dataset="imagenet2012",
            eval_split="validation",
            image_size=224,
            resize=256,
            train_view="scale_crop",
            train_scale=(256, 256),
            color_shift=0.1,
            mean=FEATURES.mean,
            std=FEATURES.std,
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=5e-4, schedule="plateau"),
        init_layers=("conv1_1", "conv2_1", "conv3_1", "conv3_2", "head"),
        batch_size=256,
        num_epochs=74,
    )
