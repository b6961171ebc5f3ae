"""Views of one image on the host, as uint8.

The test view equals torchvision's transforms of PIL images to the pixel. The training views are pure functions of the
pixels, the seed and `position`, the place of the example in the whole run.
"""

import dataclasses
import math

import numpy as np

from vgg_jax.data.image_files import scaled_size
from vgg_jax.errors import UserError, require

# pad_crop: the test view, which the device shifts; the host draws the other two.
TRAIN_VIEWS = ("pad_crop", "random_resized_crop", "scale_crop")


@dataclasses.dataclass(frozen=True)
class Views:
    """The test view and the training view of a split's images.

    The test view resizes the short side to `resize` and takes the center `image_size`.

    Raises:
      UserError: if `train_view` is unknown.
    """

    image_size: int = 32  # side of all views in pixels
    resize: int = 32  # short side of the test view in pixels, before the center crop
    train_view: str = "pad_crop"  # one of TRAIN_VIEWS
    train_scale: tuple[int, ...] = (256, 512)  # scale_crop draws the short side S from this range
    exif: bool = True  # turn photographs by their EXIF orientation

    def __post_init__(self) -> None:
        if self.train_view not in TRAIN_VIEWS:
            raise UserError(f"train_view is {self.train_view!r}; expected one of {', '.join(TRAIN_VIEWS)}")


def scale_crop(pixels: np.ndarray, size: int, smallest: int, largest: int, seed: int, position: int) -> np.ndarray:
    """Draw the paper's training view: resize the short side to S and take a random square crop.

    S is uniform in [smallest, largest]. Only the cropped part is resized.

    Args:
      pixels: (H, W, C) uint8.
      size: side of the crop.
      smallest: smallest S.
      largest: largest S.
      seed: seed of the run.
      position: place of the example in the run.

    Returns:
      The view, (size, size, C) uint8.
    """
    random = _generator(seed, position)
    height, width, _ = pixels.shape
    scaled_width, scaled_height = scaled_size((width, height), int(random.integers(smallest, largest + 1)))
    left, top = int(random.integers(scaled_width - size + 1)), int(random.integers(scaled_height - size + 1))
    across, down = width / scaled_width, height / scaled_height
    start, above = left * across, top * down
    # The minimum keeps rounding from passing the edge.
    part = (start, above, min(size * across, width - start), min(size * down, height - above))
    return _resize_part(pixels, part, size)


def random_resized_crop(pixels: np.ndarray, size: int, seed: int, position: int) -> np.ndarray:
    """Draw a crop of 8 to 100 % of the area and aspect 3/4 to 4/3, as `torchvision.transforms.RandomResizedCrop`.

    Args:
      pixels: (H, W, C) uint8.
      size: side to which the crop is resized.
      seed: seed of the run.
      position: place of the example in the run.

    Returns:
      The view, (size, size, C) uint8.
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
    else:  # torchvision's fallback: the largest center crop whose aspect is within the bounds
        width = min(full_width, round(full_height * 4 / 3))
        height = min(full_height, round(full_width * 4 / 3))
        left, top = (full_width - width) // 2, (full_height - height) // 2
    crop = pixels[top : top + height, left : left + width]  # cut first: torchvision's resizing ignores the neighbors
    return _resize_part(crop, (0.0, 0.0, float(width), float(height)), size)


def _resize_part(pixels: np.ndarray, part: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resize one part of an image, antialiased bilinear: within one level of Pillow's, in a third of its time.

    Args:
      pixels: (H, W, C) uint8.
      part: left, top, width and height of the part, in pixels.
      size: side of the result.

    Returns:
      The resized part, (size, size, C) uint8.
    """
    resizer = require("cykooz_resizer", "train")
    height, width, channels = pixels.shape
    pixel_type = resizer.PixelType.U8x3 if channels == 3 else resizer.PixelType.U8
    source = resizer.ImageData(width, height, pixel_type, pixels.tobytes())
    target = resizer.ImageData(size, size, pixel_type)
    bilinear = resizer.ResizeAlg.convolution(resizer.FilterType.bilinear)
    options = resizer.ResizeOptions(bilinear, crop_box=resizer.CropBox(*part))
    resizer.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, channels)


def _generator(seed: int, position: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
