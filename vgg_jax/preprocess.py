"""What a network's weights want of an image: it belongs to the weights, and is saved with them."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image


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
        pixels = self.view(image).astype(np.float32) / 255
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def view(self, image: "PIL.Image.Image") -> np.ndarray:
        """The image before normalisation: (crop, crop, C) uint8."""
        from vgg_jax.data import views

        image = views.to_mode(image, "L" if self.channel_order == "L" else "RGB")
        pixels = views.centre_crop(views.resize_short_side(image, self.resize), self.crop)
        return pixels[..., ::-1] if self.channel_order == "BGR" else pixels


IMAGENET = Preprocessing()
# The paper's authors' weights, which Keras has: BGR, and only the mean of the training images taken off.
AUTHORS = Preprocessing(
    mean=(103.939 / 255, 116.779 / 255, 123.68 / 255), std=(1 / 255, 1 / 255, 1 / 255), channel_order="BGR"
)
# torchvision's VGG16_Weights.IMAGENET1K_FEATURES: the same weights with the channels in the order RGB.
FEATURES = Preprocessing(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255))
