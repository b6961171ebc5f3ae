"""Views of one image on the host, from PIL to uint8, to the pixel as torchvision's transforms on PIL images."""

import math

import numpy as np
import PIL.Image
import PIL.ImageOps

BILINEAR = PIL.Image.Resampling.BILINEAR


def to_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """The image upright, as its EXIF data say, in mode RGB or L; 16-bit grey is scaled to 8, alpha is dropped."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "P"):
        image = image.convert("RGBA")
    return image.convert(mode)


def resize_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Antialiased bilinear, the short side to `size`, the long side truncated: `torchvision.transforms.Resize`."""
    width, height = image.size
    short = min(width, height)
    if short == size:
        return image
    return image.resize((int(size * width / short), int(size * height / short)), BILINEAR)


def centre_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The centre `size` x `size`, (size, size, C) uint8: `torchvision.transforms.CenterCrop`."""
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return _to_array(image.crop((left, top, left + size, top + size)))


def random_resized_crop(image: PIL.Image.Image, size: int, seed: int, position: int) -> np.ndarray:
    """A crop of 8 to 100 % of the area and aspect 3/4 to 4/3, resized: `torchvision.transforms.RandomResizedCrop`.

    A pure function of the image, the seed and `position`, the example's place in the whole run.
    """
    random = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    for _ in range(10):
        area = image.width * image.height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(random.integers(image.width - width + 1))
            top = int(random.integers(image.height - height + 1))
            break
    else:  # as torchvision: the largest central crop of an aspect within the bounds
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    return _to_array(image.crop(box).resize((size, size), BILINEAR))


def _to_array(image: PIL.Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
