"""Image files and deterministic views of one image by Pillow, equal to torchvision's to the pixel."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageOps

from vgg_jax.errors import UserError

BILINEAR = PIL.Image.Resampling.BILINEAR
LARGEST = 100_000_000  # most pixels of one image, as its header states them


def to_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Return the image in mode RGB or L; 16-bit gray is scaled to 8 bits, alpha is dropped."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "P"):
        image = image.convert("RGBA")
    return image.convert(mode)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image rotated by its EXIF orientation.

    torchvision does not rotate images, therefore the splits of a data set do not rotate them either.
    """
    return PIL.ImageOps.exif_transpose(image)


def resize_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Resize the short side to `size` pixels and truncate the long side, as `torchvision.transforms.Resize`.

    The interpolation is antialiased bilinear.
    """
    if min(image.size) == size:
        return image
    return image.resize(scaled_size(image.size, size), BILINEAR)


def center_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Return the center of the image, (size, size, C) uint8, as `torchvision.transforms.CenterCrop`."""
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return to_array(image.crop((left, top, left + size, top + size)))


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the size, in the order of `size`, at which the short side has `short_side` pixels."""
    short = min(size)
    return int(short_side * size[0] / short), int(short_side * size[1] / short)


def to_array(image: PIL.Image.Image) -> np.ndarray:
    """Return the pixels of an image in mode RGB or L, (H, W, C) uint8."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def read_image(path: str, view: Callable[[PIL.Image.Image], np.ndarray]) -> np.ndarray:
    """Return `view` of an image file; `view` is a Preprocessing, for example.

    Raises:
      UserError: if the file is not an image, or if the image has more than `LARGEST` pixels.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.width * image.height > LARGEST:
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels; expected at most {LARGEST:,}; shrink the image"
                )
            return view(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from None
