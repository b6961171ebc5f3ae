"""Compare the speed of the data path with torchvision's.

  python benchmarks/data.py [--photographs FOLDER] [--rounds N] [--images N] [--json FILE]

The benchmark writes JPEGs of about 500x375 pixels, crops of scikit-learn's two photographs, as files and as a TFDS data
set. With --photographs it takes the JPEGs of a folder. It reads them as 224x224 training views with torchvision's
transforms in a DataLoader and with our loader. Both have two workers. The arms run in turn, each in its own process. It
then measures CIFAR-10's training views of noise, the stages of our path, the rate of training and test views on 1, 2,
4, ... processors, and the time that training steps of VGG-16 at 224x224 wait for their data. It needs torch,
torchvision and scikit-learn. With --only-cores it measures only the rate on 1, 2, 4, ... processors, and needs neither
torch nor torchvision.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.data_photographs import jpegs, read_folder, write  # noqa: E402 - after the path

WORKERS = 2
BATCH = 64
CIFAR_BATCH = 128
# Not from vgg_jax, so that torchvision's arms do not import JAX.
IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR10: dict[str, Any] = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


# --- the arms: each returns images per second


def torchvision_arm(directory: str, count: int) -> float:
    """Measure a DataLoader with torchvision's transforms."""
    import torch

    from benchmarks.pytorch import import_torchvision

    torchvision = import_torchvision()
    torch.set_num_threads(1)
    view = torchvision_view(torchvision.transforms.RandomResizedCrop(224), IMAGENET)
    dataset = torchvision.datasets.ImageFolder(os.path.join(directory, "folder"), view)
    return rate(torch_loader(dataset, BATCH), BATCH, count)


def torchvision_cifar_arm(directory: str, count: int) -> float:
    """Measure CIFAR-10's usual transforms of images in memory, in the layout of torchvision's CIFAR10."""
    import PIL.Image
    import torch

    from benchmarks.pytorch import import_torchvision

    torchvision = import_torchvision()
    view = torchvision_view(torchvision.transforms.RandomCrop(32, padding=4), CIFAR10)
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, i: int) -> Any:
            return view(PIL.Image.fromarray(pixels[i])), i % 10

    return rate(torch_loader(Dataset(), CIFAR_BATCH), CIFAR_BATCH, count)


def torchvision_view(crop: Any, constants: dict[str, Any]) -> Any:
    """Return torchvision's transform: a crop, the random horizontal flip and the normalization."""
    from torchvision import transforms

    flip, to_tensor = transforms.RandomHorizontalFlip(), transforms.ToTensor()
    return transforms.Compose([crop, flip, to_tensor, transforms.Normalize(**constants)])


def torch_loader(dataset: Any, batch_size: int) -> Iterator[Any]:
    """Yield batches without end; the workers stay alive between epochs."""
    import torch

    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def our_arm(directory: str, count: int, on_device: bool = True) -> float:
    """Measure our pipeline; with `on_device`, also the horizontal flip and the normalization inside the step."""
    import jax

    batches = our_batches(directory, BATCH)
    if not on_device:
        return rate(batches, BATCH, count)
    view = imagenet_view()
    return rate((view(jax.random.key(0), batch)["image"] for batch in batches), BATCH, count)


def our_cifar_arm(directory: str, count: int) -> float:
    """Measure CIFAR-10 resident on the device, where it is indexed, cropped, flipped and normalized."""
    import jax
    from jax.sharding import Mesh

    from vgg_jax.data.augmentation import Augmentation, augment
    from vgg_jax.data.dataset import Split
    from vgg_jax.data.loader import Loader
    from vgg_jax.data.transforms import Views

    class Loaded(Loader):
        """A loader with pixels from memory: the measurement begins after the data set is read."""

        def _read_all(self) -> dict[str, np.ndarray]:
            images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
            return {"image": images, "label": np.arange(50_000) % 10, "weight": np.ones(50_000, np.float32)}

    split = Split("noise", range(50_000), 10, 3, Views())
    batches = Loaded(split, Mesh(np.array(jax.devices()), ("data",))).train_batches(0, CIFAR_BATCH, range(10**9))
    options = Augmentation(pad=4, flip=True, **CIFAR10)
    view = jax.jit(functools.partial(augment, options=options))
    return rate((view(jax.random.key(0), batch)["image"] for batch in batches), CIFAR_BATCH, count)


def cores_arm(directory: str, count: int, cores: int = 1, train_view: str = "random_resized_crop") -> float:
    """Measure the views of as many threads as processors; the process keeps to these processors."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before JAX starts its threads
    return rate(our_batches(directory, BATCH, cores, train_view), BATCH, count)


def measured_cores() -> list[int]:
    """Return 1, 2, 4, ... up to the number of processors at hand, which is the last."""
    found = len(os.sched_getaffinity(0))
    return [*(2**i for i in range(found.bit_length()) if 2**i < found), found]


def imagenet_view() -> Any:
    """Return the jitted augmentation of ImageNet's batches, whose random resized crops the host draws."""
    import jax

    from vgg_jax.data.augmentation import Augmentation, augment

    options = Augmentation(flip=True, **IMAGENET)
    return jax.jit(functools.partial(augment, options=options))


def open_photographs(directory: str, train_view: str = "random_resized_crop") -> Any:
    """Return the split of the photographs; with `pad_crop`, its training views are the test views."""
    from vgg_jax.data.dataset import open_split
    from vgg_jax.data.transforms import Views

    return open_split("photographs", "train", Views(224, 256, train_view), data_dir=directory)


def our_batches(
    directory: str, batch_size: int, num_threads: int = WORKERS, train_view: str = "random_resized_crop"
) -> Iterator[Any]:
    """Return batches of the photographs without end."""
    import jax
    from jax.sharding import Mesh

    from vgg_jax.data.loader import Loader

    mesh = Mesh(np.array(jax.devices()), ("data",))
    loader = Loader(open_photographs(directory, train_view), mesh, num_threads=num_threads, resident=False)
    return loader.train_batches(0, batch_size, range(10**9))


def rate(batches: Iterator[Any], batch_size: int, count: int) -> float:
    """Return images per second over `count` images.

    Half as many images are read first: this uses up the batches that were read ahead during compilation.
    """

    def read(images: int) -> None:
        for _ in range(max(images // batch_size, 4)):
            batch = next(batches)
        if hasattr(batch, "block_until_ready"):
            batch.block_until_ready()

    read(count // 2)
    start = time.perf_counter()
    read(count)
    return max(count // batch_size, 4) * batch_size / (time.perf_counter() - start)


def stages(directory: str, count: int) -> dict[str, float]:
    """Return the milliseconds for one image of each stage of our path, in one thread."""
    import jax

    from vgg_jax.data import transforms as views
    from vgg_jax.data.image_files import center_view, decode_file

    split = open_photographs(directory)
    n = min(count, len(split))
    records = [split.records[i] for i in range(n)]
    images = [decode_file(record["image"], "RGB") for record in records]
    batch = np.stack([split.random_view(i, 0, i)[0] for i in range(BATCH)])
    view, key = imagenet_view(), jax.random.key(0)

    def augmented(i: int) -> Any:
        return jax.block_until_ready(view(key, {"image": batch}))

    augmented(0)  # compiles
    return {
        "read the record": milliseconds(lambda i: split.records[i], n),
        "decode the JPEG": milliseconds(lambda i: decode_file(records[i]["image"], "RGB"), n),
        "test view": milliseconds(lambda i: center_view(images[i], 256, 224), n),
        "random resized crop": milliseconds(lambda i: views.random_resized_crop(images[i], 224, 0, i), n),
        "paper's crop, S from 256 to 512": milliseconds(lambda i: views.scale_crop(images[i], 224, 256, 512, 0, i), n),
        "stack to a batch": milliseconds(lambda i: np.stack([batch[0]] * BATCH), 20) / BATCH,
        "flip and normalize, on the device": milliseconds(augmented, 20) / BATCH,
    }


def milliseconds(function: Callable[[int], Any], count: int) -> float:
    """Return the time of one call: the least of three means over `count` calls."""
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for i in range(count):
            function(i)
        means.append((time.perf_counter() - start) / count * 1e3)
    return min(means)


def waiting(directory: str, steps: int) -> dict[str, float]:
    """Return the seconds that training steps of VGG-16 at 224x224, batch 8, take, and wait for their batches."""
    import jax
    import optax

    from vgg_jax import VGG
    from vgg_jax.training.state import create_train_state
    from vgg_jax.training.step import train_step

    model = VGG(16, num_classes=10)
    optimizer = optax.sgd(0.01, 0.9)
    state = jax.jit(lambda key: create_train_state(key, model, optimizer, (224, 224, 3)))(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, augment=imagenet_view()), donate_argnums=0)
    batches = our_batches(directory, 8, num_threads=8)
    waited = 0.0
    for i in range(steps + 2):
        if i == 2:  # after compiling
            jax.block_until_ready(state)
            start, waited = time.perf_counter(), 0.0
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        state, metrics = step(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)
    return {"total": time.perf_counter() - start, "waited": waited}


ARMS: dict[str, Callable[..., Any]] = {
    "torchvision": torchvision_arm,
    "ours": our_arm,
    "ours, without the device's part": functools.partial(our_arm, on_device=False),
    "CIFAR, torchvision": torchvision_cifar_arm,
    "CIFAR, ours": our_cifar_arm,
    "stages": stages,
    "waiting": waiting,
}
CORES = {
    f"{views} views, {cores} processor{'s' * (cores > 1)}": functools.partial(cores_arm, cores=cores, train_view=view)
    for views, view in (("training", "random_resized_crop"), ("test", "pad_crop"))
    for cores in measured_cores()
}
ARMS |= CORES


def run(arm: str, directory: str, count: int) -> Any:
    """Run one arm in its own process and return its result."""
    options = ["--arm", arm, "--directory", directory, "--images", str(count)]
    command = [sys.executable, os.path.abspath(__file__), *options]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": ROOT}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def print_cores(medians: dict[str, float]) -> None:
    """Print the rate for each processor, and its ratio to the rate of one."""
    for name in CORES:
        views, cores = name.split(", ")
        one, each = medians[f"{views}, 1 processor"], medians[name] / int(cores.split()[0])
        print(f"{name}: {medians[name]:,.0f} images/s, {each:,.0f} for each, efficiency {each / one:.0%}")


def main() -> None:
    """Run all arms in turn and print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all arms (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="images to read in a round (default: %(default)s)")
    parser.add_argument("--photographs", metavar="FOLDER", help="folder of JPEGs (default: made-up ones)")
    parser.add_argument("--only-cores", action="store_true", help="measure only the rate on 1, 2, 4, ... processors")
    parser.add_argument("--steps", type=int, default=8, help="training steps of VGG-16 (default: %(default)s)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options.directory, options.images)))
        return

    names = [name for name in (CORES if options.only_cores else ARMS) if name not in ("stages", "waiting")]
    with tempfile.TemporaryDirectory() as directory:
        print(write(directory, read_folder(options.photographs) if options.photographs else jpegs(options.images)))
        rates: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                count = options.images * (20 if name.startswith("CIFAR") else 1)
                rates[name].append(run(name, directory, count))
                print(f"{name}: {rates[name][-1]:,.0f} images/s", flush=True)
        figures: dict[str, Any] = {"rates": rates}
        if not options.only_cores:
            figures["stages"] = run("stages", directory, min(options.images, 500))
            figures["waiting"] = run("waiting", directory, options.steps)
    report(figures, options.rounds, options.steps)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


def report(figures: dict[str, Any], rounds: int, steps: int) -> None:
    """Print the medians and their ratios."""
    medians = {name: statistics.median(values) for name, values in figures["rates"].items()}
    print_cores(medians)
    if "stages" not in figures:
        return
    for name in [name for name in medians if name not in CORES]:
        print(f"median of {rounds}: {name}: {medians[name]:,.0f} images/s")
    print(f"ours over torchvision: {medians['ours'] / medians['torchvision']:.2f}")
    print(f"CIFAR, ours over torchvision: {medians['CIFAR, ours'] / medians['CIFAR, torchvision']:.2f}")
    for name, value in figures["stages"].items():
        print(f"{name}: {value:.3f} ms an image")
    waited, total = figures["waiting"]["waited"], figures["waiting"]["total"]
    print(f"VGG-16 at 224x224, batch 8: {steps} steps in {total:.1f} s, {waited / total:.2%} waiting")


if __name__ == "__main__":
    main()
