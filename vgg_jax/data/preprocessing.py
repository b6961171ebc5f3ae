"""The preprocessing that a set of weights expects; it is saved with the weights."""

import dataclasses

import numpy as np
import PIL.Image

from vgg_jax.data.image_files import center_crop, decode, resize_short_side, to_array
from vgg_jax.errors import UserError

CHANNEL_ORDERS = ("RGB", "BGR", "L")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Conversion of a PIL image to the input of a network.

    The short side is resized to `resize`, the center `crop` is taken and normalized: (pixel / 255 - mean) / std. The
    defaults are those of torchvision's ImageNet weights.
    """

    resize: int = 256  # short side in pixels, antialiased bilinear
    crop: int = 224  # side of the square input in pixels
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel in `channel_order`, for pixels in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # likewise
    channel_order: str = "RGB"  # or BGR, or L for one gray channel
    exif: bool = True  # turn photographs by their EXIF orientation

    def check(self) -> None:
        """Raise UserError for values that no network can be meant to have, such as a mean of pixels in 0 to 255."""
        channels = 1 if self.channel_order == "L" else 3
        problems = [
            (all(0 <= m <= 1 for m in self.mean),
             f"the mean is {self.mean}; expected that of pixels in [0, 1]: divide the mean and std of pixels by 255"),
            (all(0 < s <= 1 for s in self.std),
             f"the std is {self.std}; expected that of pixels in [0, 1], above 0: divide that of pixels by 255"),
            (self.channel_order in CHANNEL_ORDERS,
             f"the channel order is {self.channel_order!r}; expected one of {', '.join(CHANNEL_ORDERS)}"),
            (len(self.mean) == len(self.std) == channels,
             f"the mean has {len(self.mean)} and the std {len(self.std)} values; expected {channels} of each for the "
             f"channel order {self.channel_order}"),
            (self.crop > 0, f"the crop is {self.crop}; expected 1 or more pixels"),
            (self.resize >= self.crop, f"the short side is resized to {self.resize}; expected at least the crop of "
             f"{self.crop}"),
        ]  # fmt: skip
        for holds, problem in problems:
            if not holds:
                raise UserError(problem)

    def __call__(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the network's input, (crop, crop, C) float32, of an image of any mode and EXIF orientation.

        The channels are in `channel_order`, so C is 3, or 1 for L.

        Raises:
          UserError: if the range of the image's values is unknown, as of floating-point values.
          OSError, ValueError, SyntaxError or DecompressionBombError, as Pillow: if the image cannot be decoded.
        """
        return self._normalize(self.view(image))

    def view(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the resized and cropped image before normalization, (crop, crop, C) uint8 in `channel_order`.

        Raises:
          The errors of `__call__`.
        """
        return self.ordered(center_crop(self._resized(image, self.resize), self.crop))

    def uncropped(self, image: PIL.Image.Image, resize: int) -> np.ndarray:
        """Return the whole image with its short side resized to `resize`, normalized, (H, W, C) float32.

        Args:
          image: the image.
          resize: the short side in pixels, in place of the field.

        Raises:
          The errors of `__call__`.
        """
        return self._normalize(self.resized(image, resize))

    def resized(self, image: PIL.Image.Image, resize: int) -> np.ndarray:
        """Return what `uncropped` normalizes, (H, W, C) uint8."""
        return self.ordered(self.pixels(image, resize))

    def pixels(self, image: PIL.Image.Image, resize: int) -> np.ndarray:
        """Return the whole image with its short side resized to `resize`, (H, W, C) uint8, RGB or gray."""
        return to_array(self._resized(image, resize))

    def to_image(self, array: np.ndarray) -> PIL.Image.Image:
        """Return the image of a network's input: the inverse of the normalization, rounded and clipped to uint8.

        Args:
          array: (H, W, C) floats, with the channels in `channel_order`.

        Returns:
          The image in mode RGB, or L if `channel_order` is L.
        """
        pixels = np.asarray(array, np.float32) * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
        pixels = self.ordered((pixels * 255).round().clip(0, 255).astype(np.uint8))
        return PIL.Image.fromarray(pixels[..., 0] if self.channel_order == "L" else pixels)

    def _resized(self, image: PIL.Image.Image, size: int) -> PIL.Image.Image:
        return resize_short_side(decode(image, "L" if self.channel_order == "L" else "RGB", self.exif), size)

    def ordered(self, pixels: np.ndarray) -> np.ndarray:
        """Return pixels (H, W, C), RGB or gray, with the channels in `channel_order`, or the inverse."""
        return pixels[..., ::-1] if self.channel_order == "BGR" else pixels

    def _normalize(self, pixels: np.ndarray) -> np.ndarray:
        scaled = pixels.astype(np.float32) / 255
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


# torchvision's ImageNet weights.
IMAGENET = Preprocessing()

# The weights of the paper's authors, in Keras' files: BGR, only the mean of the training images subtracted.
AUTHORS = Preprocessing(
    mean=(103.939 / 255, 116.779 / 255, 123.68 / 255), std=(1 / 255, 1 / 255, 1 / 255), channel_order="BGR"
)

# torchvision's VGG16_Weights.IMAGENET1K_FEATURES: the authors' weights with the channels in the order RGB.
FEATURES = Preprocessing(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))

# Networks of 32x32 images, normalized by the statistics of CIFAR-10's training images.
CIFAR10 = Preprocessing(resize=32, crop=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
