"""Views of one image on the host, as uint8.

The test view is torchvision's transforms of PIL images, to the pixel. The training views are pure functions of the
pixels, the seed and `position`, the example's place in the whole run.
"""

import io
import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

BILINEAR = PIL.Image.Resampling.BILINEAR


def to_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """The image in mode RGB or L: 16-bit grey is scaled to 8, alpha is dropped."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "P"):
        image = image.convert("RGBA")
    return image.convert(mode)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image turned as its EXIF data say. torchvision does not do that, and so data sets are not turned either."""
    return PIL.ImageOps.exif_transpose(image)


def resize_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """Antialiased bilinear, the short side to `size`, the long side truncated: `torchvision.transforms.Resize`."""
    if min(image.size) == size:
        return image
    return image.resize(_scaled(image.size, size), BILINEAR)


def centre_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The centre `size` x `size`, (size, size, C) uint8: `torchvision.transforms.CenterCrop`."""
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return _to_array(image.crop((left, top, left + size, top + size)))


def decode(data: bytes, mode: str) -> np.ndarray:
    """The pixels of an image file, (H, W, C) uint8 in mode RGB or L: Pillow's, but RGB from JPEGs in less time.

    Raises:
      OSError, ValueError, SyntaxError or DecompressionBombError, as Pillow, where that cannot be done.
    """
    if mode == "RGB":
        try:
            height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
            if color_space in ("YCbCr", "Gray", "RGB") and height * width <= (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # no JPEG, or one with faults, of which Pillow forgives more
    return _to_array(to_mode(PIL.Image.open(io.BytesIO(data)), mode))


def scale_crop(pixels: np.ndarray, size: int, smallest: int, largest: int, seed: int, position: int) -> np.ndarray:
    """The paper's training view: the short side to S, uniform in [smallest, largest]; of that a random `size` x `size`.

    From (H, W, C) to (size, size, C) uint8. Only what the crop shows is resized.
    """
    random = _generator(seed, position)
    height, width, _ = pixels.shape
    scaled_width, scaled_height = _scaled((width, height), int(random.integers(smallest, largest + 1)))
    left, top = int(random.integers(scaled_width - size + 1)), int(random.integers(scaled_height - size + 1))
    across, down = width / scaled_width, height / scaled_height
    start, above = left * across, top * down
    part = (
        start,
        above,
        min(size * across, width - start),
        min(size * down, height - above),
    )  # rounding may pass the edge
    return _resize_part(pixels, part, size)


def random_resized_crop(pixels: np.ndarray, size: int, seed: int, position: int) -> np.ndarray:
    """A crop of 8 to 100 % of the area and aspect 3/4 to 4/3, resized: `torchvision.transforms.RandomResizedCrop`.

    From (H, W, C) to (size, size, C) uint8.
    """
    random = _generator(seed, position)
    full_height, full_width, _ = pixels.shape
    for _ in range(10):
        area = full_width * full_height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(random.integers(full_width - width + 1))
            top = int(random.integers(full_height - height + 1))
            break
    else:  # as torchvision: the largest central crop of an aspect within the bounds
        width = min(full_width, round(full_height * 4 / 3))
        height = min(full_height, round(full_width * 4 / 3))
        left, top = (full_width - width) // 2, (full_height - height) // 2
    crop = pixels[top : top + height, left : left + width]  # whose neighbours the resizing does not see
    return _resize_part(crop, (0, 0, width, height), size)


def _resize_part(pixels: np.ndarray, part: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Of (H, W, C) the part at (left, top, width, height) as (size, size, C), antialiased bilinear.

    Within one level of Pillow's resizing, in a third of its time.
    """
    height, width, channels = pixels.shape
    pixel_type = PixelType.U8x3 if channels == 3 else PixelType.U8
    source = ImageData(width, height, pixel_type, pixels.tobytes())
    target = ImageData(size, size, pixel_type)
    bilinear = ResizeAlg.convolution(FilterType.bilinear)
    Resizer().resize(source, target, ResizeOptions(bilinear, crop_box=CropBox(*part)))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, channels)


def _generator(seed: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    short = min(size)
    return int(short_side * size[0] / short), int(short_side * size[1] / short)


def _to_array(image: PIL.Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
