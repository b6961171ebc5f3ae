"""The photographs of the data benchmark: made-up JPEGs, or those of a folder, as files and as a TFDS data set."""

import io
import os
from collections.abc import Iterable, Iterator

import numpy as np


def jpegs(count: int) -> Iterator[bytes]:
    """Yield JPEGs whose long side has 420 to 580 pixels, in the proportions 4:3 and 3:4 of most ImageNet images."""
    import PIL.Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = [PIL.Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(count):
        width, height = (427, 320) if i % 4 else (320, 427)  # the part that is cut out of 640x427
        left, top = int(random.integers(641 - width)), int(random.integers(428 - height))
        scale = random.uniform(420, 580) / 427
        crop = photos[i % 2].crop((left, top, left + width, top + height))
        file = io.BytesIO()
        crop.resize((round(width * scale), round(height * scale))).save(file, "JPEG", quality=95)
        yield file.getvalue()


def read_folder(folder: str) -> Iterator[bytes]:
    """Yield the JPEGs in a folder and its subfolders, in the order of their names."""
    names = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    jpegs = sorted(name for name in names if name.lower().endswith((".jpg", ".jpeg")))
    if not jpegs:
        raise SystemExit(f"{folder} has no .jpg or .jpeg file; choose a folder of photographs")
    for name in jpegs:
        with open(name, "rb") as file:
            yield file.read()


def write(directory: str, photographs: Iterable[bytes]) -> str:
    """Write JPEGs in the layout of torchvision's ImageFolder, and as a TFDS data set in array_record format.

    Returns:
      The number of the JPEGs and their average size, for people.
    """
    import tensorflow_datasets as tfds

    from vgg_jax.data.prepare.shards import Shard, serialize, write_once

    images = list(photographs)
    for i, image in enumerate(images):
        folder = os.path.join(directory, "folder", str(i % 10))
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"{i}.jpg"), "wb") as file:
            file.write(image)
    target = os.path.join(directory, "photographs", "1.0.0")
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=10),
        "file_name": tfds.features.Text(),
    }
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="photographs", version=tfds.core.Version("1.0.0"), data_dir=target, module_name=__name__
        ),
        features=tfds.features.FeaturesDict(features),
    )
    examples = (
        {"image": io.BytesIO(image), "label": i % 10, "file_name": f"{i}.jpg"} for i, image in enumerate(images)
    )
    write_once(target, lambda: (info, [Shard("train", lambda: serialize(info, examples))]))
    return f"{len(images)} JPEGs of {np.mean([len(image) for image in images]) / 1000:.0f} kB on average"
