"""A plain PyTorch trainer of configs/cifar10_short.py without averages, to compare vgg_jax with.

    python experiments/cifar10_torch.py DATA --out RUN [--epochs 5] [--seed 0] [--compile] [--time-only]

VGG with batch norm on a folder of CIFAR-10's images: uint8 pixels in memory, batched augmentation of tensors,
channels_last, fused SGD. Writes RUN/metrics.jsonl. --time-only measures the start and a step instead. Imports nothing
of vgg_jax, so that its time is PyTorch's.
"""

import argparse
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn

STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIDE, PAD = 32, 4
TIMED_STEPS = 12


class Network(nn.Module):
    """VGG with batch norm, global average pooling and one dense layer; torchvision's names and initialization."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in STAGES[depth]:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(channels, 10))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def files_of(folder: str, split: str) -> list[tuple[str, int]]:
    """Return paths and labels of NAME or NAME[START:STOP], cut from the order of the SHA-256 of CLASS/IMAGE."""
    found = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    assert found, split
    root = os.path.join(folder, found[1])
    classes = sorted(os.listdir(root))
    keys = [f"{name}/{image}" for name in classes for image in sorted(os.listdir(os.path.join(root, name)))]
    keys.sort(key=lambda key: hashlib.sha256(key.encode()).digest())
    chosen = sorted(keys[int(found[2] or 0) : int(found[3] or len(keys))])
    return [(os.path.join(root, key), classes.index(key.split("/")[0])) for key in chosen]


def read(folder: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels (N, H, W, C) uint8 and the labels (N,) of a split."""
    files = files_of(folder, split)

    def pixels(path: str) -> np.ndarray:
        with PIL.Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        images = np.stack(list(threads.map(pixels, (path for path, _ in files), chunksize=256)))
    return torch.from_numpy(images), torch.tensor([label for _, label in files])


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Return the normalized images of pixels (N, H, W, C), as (N, C, H, W) in memory format channels_last."""
    return ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def crop(pixels: torch.Tensor, corners: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Return crops of the reflected images, some of them flipped horizontally, by one indexing operation.

    Args:
      pixels: (N, H, W, C).
      corners: (N, 2), from 0 to 2 PAD.
      flips: (N,) bool.
    """
    places = torch.arange(SIDE)
    rows, columns = corners[:, :1] + places, corners[:, 1:] + places
    # The flip comes after the crop.
    columns = torch.where(flips[:, None], columns.flip(1), columns)

    def reflected(place: torch.Tensor) -> torch.Tensor:
        place = (place - PAD).abs()
        return torch.where(place >= SIDE, 2 * SIDE - 2 - place, place)

    return pixels[torch.arange(len(pixels))[:, None, None], reflected(rows)[:, :, None], reflected(columns)[:, None]]


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Return the normalized images after a random crop and a random horizontal flip."""
    corners = torch.randint(0, 2 * PAD + 1, (len(pixels), 2))
    return normalize(crop(pixels, corners, torch.rand(len(pixels)) < 0.5))


def rate_at(update: int, warmup: int, updates: int) -> float:
    """Return the factor on the learning rate: a linear rise from zero, then a linear fall to zero."""
    return update / warmup if update < warmup else 1 - min(1, (update - warmup) / max(1, updates - warmup))


def make_optimizer(network: nn.Module, rate: float, weight_decay: float) -> torch.optim.SGD:
    """Return Nesterov's SGD with weight decay of the kernels only."""
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, fused=True)


def batches(images: torch.Tensor, labels: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the augmented batches of an epoch; drop the last, incomplete one."""
    for rows in torch.randperm(len(images)).split(size)[: len(images) // size]:
        yield augment(images[rows]), labels[rows]


def accuracy_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy with the mean of the logits of each image and its horizontal flip."""
    network.eval()
    correct = 0
    with torch.inference_mode():
        for pixels, truth in zip(images.split(512), labels.split(512), strict=True):
            views = normalize(pixels)
            logits = network(views) + network(views.flip(3))
            correct += int((logits.argmax(1) == truth).sum())
    network.train()
    return correct / len(labels)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
    parser.add_argument("--out", required=True, help="folder for metrics.jsonl")
    for name, value in (("depth", 11), ("seed", 0), ("batch-size", 128)):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    for name, default in (("epochs", 5.0), ("warmup-epochs", 1.0), ("rate", 0.1), ("weight-decay", 5e-4)):
        parser.add_argument(f"--{name}", type=float, default=default, help="(default: %(default)s)")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--train-split", default="train[:45000]", help="(default: %(default)s)")
    parser.add_argument("--eval-split", default="train[45000:]", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--time-only", action="store_true", help="time the first step and later ones, then stop")
    return parser.parse_args()


def main() -> None:
    """Train, or time some steps."""
    options, start = parse(), time.perf_counter()
    torch.manual_seed(options.seed)
    train_images, train_labels = read(options.data, options.train_split)
    eval_images, eval_labels = read(options.data, options.eval_split)
    network: Any = Network(options.depth).train()
    network = network.to(memory_format=torch.channels_last)  # unknown to PyTorch's annotations
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network) if options.compile else network
    optimizer = make_optimizer(network, options.rate, options.weight_decay)
    per_epoch = len(train_images) // options.batch_size
    warmup, updates = round(options.warmup_epochs * per_epoch), round(options.epochs * per_epoch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate_at(update, warmup, updates))
    loss_of = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    times: list[float] = []

    def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_of(forward(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    os.makedirs(options.out, exist_ok=True)
    if options.time_only:
        for batch in batches(train_images, train_labels, options.batch_size):
            clock = time.perf_counter()
            take(*batch)
            times.append(time.perf_counter() - clock)
            if len(times) > TIMED_STEPS:
                break
        print(json.dumps({"first_step": times[0], "step": sorted(times[1:])[len(times[1:]) // 2]}))
        return
    with open(os.path.join(options.out, "metrics.jsonl"), "w") as file:
        for epoch in range(1, round(options.epochs) + 1):
            clock = time.perf_counter()
            losses = [take(*batch) for batch in batches(train_images, train_labels, options.batch_size)]
            seconds = time.perf_counter() - clock
            accuracy = accuracy_of(network, eval_images, eval_labels)
            line = {"epoch": epoch, "loss": float(torch.stack(losses).mean()), "accuracy": accuracy, "seconds": seconds}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"epoch {epoch}  loss {line['loss']:.4f}  accuracy {accuracy:.2%}  {seconds:.0f} s", flush=True)
    print(f"finished after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
