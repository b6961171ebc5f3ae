"""The arms of benchmarks/throughput.py on PyTorch."""

import functools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.pytorch import import_torchvision
from benchmarks.throughput_cells import MEAN, MOMENTUM, RATE, STD, WEIGHT_DECAY, Cell, noise_pixels


class TorchEager:
    """torchvision's network, eager; SGD is PyTorch's fused one, its fastest."""

    channels_last: ClassVar[bool] = False
    compiled: ClassVar[bool] = False

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        self.cell, self.on_cpu = cell, not torch.cuda.is_available()
        self.device = "cpu" if self.on_cpu else "cuda"
        name = f"vgg{cell.depth}{'_bn' if cell.batch_norm else ''}"
        net = getattr(import_torchvision().models, name)(init_weights=False, dropout=0.0)
        if cell.cifar_head:
            net.avgpool, net.classifier = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Sequential(torch.nn.Linear(512, 10))
        absent = net.load_state_dict({key: torch.from_numpy(array) for key, array in weights.items()}, strict=False)
        assert not absent.unexpected_keys and all("num_batches" in key for key in absent.missing_keys), absent
        self.layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.net = net.to(self.device, memory_format=self.layout).train(cell.mode != "infer")
        self.forward = torch.compile(self.net) if self.compiled else self.net
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.images = x.to(self.device).contiguous(memory_format=self.layout)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        self.cast = functools.partial(torch.autocast, self.device, torch.bfloat16, enabled=cell.dtype == "bfloat16")
        self.next_batch: Any = lambda: (self.images, self.labels)
        self.wait(None)

    def logits(self) -> Any:
        """Return the logits of the batch, in evaluation mode; without torch.compile if training is timed."""
        training = self.net.training
        network = self.net.eval() if training else self.forward
        with torch.inference_mode(), self.cast():
            logits = network(self.images)
        self.net.train(training)
        return logits

    def start_training(self) -> None:
        """Create the optimizer."""
        parameters = self.net.parameters()
        self.optimizer = torch.optim.SGD(parameters, RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

    def start_epochs(self) -> None:
        """Make the next steps take their batches from a shuffled epoch on the device, and augment them."""
        pixels, labels = (torch.from_numpy(array).to(self.device) for array in noise_pixels(self.cell))
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        view = torch.compile(augment) if self.compiled else augment

        def batches() -> Iterator[Any]:
            while True:
                order = torch.randperm(len(pixels), device=self.device)
                for rows in order.split(self.cell.batch)[: len(pixels) // self.cell.batch]:
                    yield view(pixels[rows]).contiguous(memory_format=self.layout), labels[rows]

        self.next_batch = functools.partial(next, batches())

    def step(self) -> Any:
        """Run one step; return the logits, or the loss before the update."""
        if self.cell.mode == "infer":
            return self.logits()
        images, labels = self.next_batch()
        with self.cast():
            loss = torch.nn.functional.cross_entropy(self.forward(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self, result: Any) -> None:
        """Wait for a result."""
        if not self.on_cpu:
            torch.cuda.synchronize()

    def matrix_product(self, n: int) -> Any:
        """Return a matrix and the function that multiplies by it."""
        a = np.random.default_rng(0).standard_normal((n, n), np.float32) / n**0.5
        b = torch.from_numpy(a).to(self.device, getattr(torch, self.cell.dtype))
        return b, lambda c: c @ b

    def device_peak(self) -> int:
        """Return the peak memory of an accelerator in bytes; 0 on a CPU."""
        return 0 if self.on_cpu else torch.cuda.max_memory_allocated()


class TorchChannelsLast(TorchEager):
    """PyTorch eager in memory format channels_last."""

    channels_last = True


class TorchCompile(TorchEager):
    """PyTorch with torch.compile."""

    compiled = True


class TorchCompileChannelsLast(TorchCompile):
    """PyTorch with torch.compile, in memory format channels_last."""

    channels_last = True


def augment(images: torch.Tensor) -> torch.Tensor:
    """Return a uint8 batch after padding by 4, random crop, random horizontal flip and normalization."""
    n, channels, size, _ = images.shape
    each = functools.partial(torch.arange, device=images.device)
    corners = torch.randint(0, 9, (2, n, 1, 1, 1), device=images.device)
    rows, columns = corners[0] + each(size)[:, None], corners[1] + each(size)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    images = padded[each(n)[:, None, None, None], each(channels)[:, None, None], rows, columns]
    flip = torch.rand((n, 1, 1, 1), device=images.device) < 0.5
    images = torch.where(flip, images.flip(3), images).float() / 255
    mean, std = (torch.tensor(constants, device=images.device)[:, None, None] for constants in (MEAN, STD))
    return (images - mean) / std
