"""What a network's weights want of an image: it belongs to the weights, and is saved with them."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vgg_jax.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

LARGEST = 100_000_000  # pixels of one image, as its header states


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a PIL image to a network's input: short side to `resize`, centre `crop`, (pixel / 255 - mean) / std.

    The default is torchvision's for its ImageNet weights.
    """

    resize: int = 256  # the short side, antialiased bilinear
    crop: int = 224  # the side of the square input
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel in `channel_order`, of pixels in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "RGB"  # or BGR, or L for one grey channel

    def __call__(self, image: "PIL.Image.Image") -> np.ndarray:
        """From an image of any mode, rotated as its EXIF data say, to (crop, crop, C) float32."""
        return self._normalize(self.view(image))

    def view(self, image: "PIL.Image.Image") -> np.ndarray:
        """The image before normalisation: (crop, crop, C) uint8."""
        from vgg_jax.data import views

        return self._order(views.centre_crop(self._resized(image, self.resize), self.crop))

    def uncropped(self, image: "PIL.Image.Image", resize: int) -> np.ndarray:
        """The whole image with its short side resized to `resize`: (H, W, C) float32, normalised."""
        return self._normalize(self._order(np.atleast_3d(np.asarray(self._resized(image, resize)))))

    def to_image(self, array: np.ndarray) -> "PIL.Image.Image":
        """The image that a network's input (H, W, C) shows: the way back, rounded and clipped to uint8."""
        import PIL.Image

        pixels = np.asarray(array, np.float32) * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
        pixels = self._order((pixels * 255).round().clip(0, 255).astype(np.uint8))
        return PIL.Image.fromarray(pixels[..., 0] if self.channel_order == "L" else pixels)

    def _resized(self, image: "PIL.Image.Image", size: int) -> "PIL.Image.Image":
        from vgg_jax.data import views

        mode = "L" if self.channel_order == "L" else "RGB"
        return views.resize_short_side(views.to_mode(views.upright(image), mode), size)

    def _order(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[..., ::-1] if self.channel_order == "BGR" else pixels

    def _normalize(self, pixels: np.ndarray) -> np.ndarray:
        scaled = pixels.astype(np.float32) / 255
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


def read_image(path: str, view: Callable[["PIL.Image.Image"], np.ndarray]) -> np.ndarray:
    """What `view`, a Preprocessing for example, makes of an image file.

    Raises:
      UserError: where it is no image, or larger than any should be.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            if image.width * image.height > LARGEST:
                raise UserError(f"{path}: {image.width} x {image.height} pixels; expected at most {LARGEST:,}")
            return view(image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from None


IMAGENET = Preprocessing()
# The paper's authors' weights, which Keras has: BGR, and only the mean of the training images taken off.
AUTHORS = Preprocessing(
    mean=(103.939 / 255, 116.779 / 255, 123.68 / 255), std=(1 / 255, 1 / 255, 1 / 255), channel_order="BGR"
)
# torchvision's VGG16_Weights.IMAGENET1K_FEATURES: the same weights with the channels in the order RGB.
FEATURES = Preprocessing(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))
