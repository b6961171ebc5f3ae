"""Stand-ins for the archives of CIFAR and ImageNet: the official layout with other images."""

import hashlib
import io
import os
import tarfile

import numpy as np

from tests.conftest import photographs

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def add(tar, name, data):
    """Add a file to an archive that is being written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_cifar10_archive(path, per_file=40):
    """Write an archive of six files and return TFDS's infos by URL.

    Each file has `per_file` images of noise around one color for each class.
    """
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    random = np.random.default_rng(0)
    colors = random.integers(60, 196, (10, 3, 1, 1))
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            labels = np.arange(per_file) % 10
            images = colors[labels] + random.integers(-60, 60, (per_file, 3, 32, 32))
            records = np.concatenate([labels[:, None], images.reshape(per_file, -1)], 1).astype(np.uint8)
            add(tar, f"cifar-10-batches-bin/{name}.bin", records.tobytes())
        add(tar, "cifar-10-batches-bin/batches.meta.txt", "\n".join([*CIFAR10_CLASSES, "", ""]).encode())
    with open(path, "rb") as file:
        data = file.read()
    info = UrlInfo(Size(len(data)), hashlib.sha256(data).hexdigest(), os.path.basename(path))
    return {"https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": info}


def encoded(image, image_format="JPEG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def write_imagenet_archives(directory, synsets, num_validation=20, size=48):
    """Write one training image for each synset, and a second one, in CMYK and as PNG, for the first two synsets."""
    photos = [image.resize((size + i % 7, size)) for i, image in enumerate(photographs(40))]
    with tarfile.open(os.path.join(directory, "ILSVRC2012_img_train.tar"), "w") as train:
        for i, synset in enumerate(synsets):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                add(tar, f"{synset}_{i}.JPEG", encoded(photos[i % len(photos)], quality=85))
                if i == 0:
                    add(tar, f"{synset}_cmyk.JPEG", encoded(photos[0].convert("CMYK")))
                if i == 1:
                    add(tar, f"{synset}_png.JPEG", encoded(photos[1], "PNG"))
            add(train, f"{synset}.tar", inner.getvalue())
    with tarfile.open(os.path.join(directory, "ILSVRC2012_img_val.tar"), "w") as tar:
        for i in reversed(range(num_validation)):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encoded(photos[i % len(photos)]))


def manual_dir(data_dir):
    """Create and return the directory in which a user places archives."""
    path = data_dir / "downloads" / "manual"
    path.mkdir(parents=True, exist_ok=True)
    return path


def prepare_imagenet(data_dir):
    """Prepare ImageNet from stand-in archives in a data directory, and return the directory."""
    import tensorflow_datasets as tfds

    from vgg_jax.data.prepare import imagenet

    synsets = tfds.builder("imagenet2012", data_dir="/nonexistent").info.features["label"].names
    write_imagenet_archives(manual_dir(data_dir), synsets)
    imagenet.prepare(str(data_dir))
    return data_dir


def records(data_dir, name, split):
    """Return all records of a split."""
    from vgg_jax.data.dataset import open_split

    source = open_split(name, split, data_dir=str(data_dir)).records
    return [source[i] for i in range(len(source))]


def assert_same_records(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a == b
