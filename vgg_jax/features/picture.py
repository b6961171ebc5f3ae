"""Pictures of explanations: an image beside the same image with its explanation."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import Float, UInt8

# The colors of values from 0 to 1 (black, violet, red, orange, yellow), and of values from -1 to 1 (blue, white, red).
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
SIGNED = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))
MARGIN = 12  # pixels around and between the panels
FONT_SIZE = 16


def heat_overlay(pixels: UInt8[np.ndarray, "h w c"], heat: Float[np.ndarray, "map_h map_w"]) -> PIL.Image.Image:
    """Return an image under a translucent map of values of at least 0: yellow at the largest, dark at the smallest.

    Args:
      pixels: (H, W, 3) or (H, W, 1) uint8.
      heat: (H', W') values of at least 0, enlarged to the image.
    """
    largest = heat.max()
    scaled = PIL.Image.fromarray(np.float32(heat / largest if largest > 0 else heat))
    scaled = scaled.resize(pixels.shape[1::-1], PIL.Image.Resampling.BICUBIC)
    values = np.asarray(scaled).clip(0, 1)[..., None]
    return _blend(pixels, _colors(values[..., 0], HEAT), 0.25 + 0.4 * values)


def signed_overlay(pixels: UInt8[np.ndarray, "h w c"], values: Float[np.ndarray, "h w"]) -> PIL.Image.Image:
    """Return a gray image under a translucent map: red where a pixel speaks for the class, blue where against it.

    The largest percent of the values has the full color, so that a few pixels do not hide the others.

    Args:
      pixels: (H, W, 3) or (H, W, 1) uint8.
      values: (H, W).
    """
    largest = np.percentile(np.abs(values), 99) or np.abs(values).max() or 1.0
    scaled = (values / largest).clip(-1, 1)
    gray = np.asarray(_rgb(pixels).convert("L"))[..., None]
    return _blend(gray, _colors((scaled + 1) / 2, SIGNED), np.sqrt(np.abs(scaled))[..., None] * 0.9)


def gradient_image(gradient: Float[np.ndarray, "h w c"]) -> PIL.Image.Image:
    """Return a gradient by the pixels as an image: gray where it is zero.

    Args:
      gradient: (H, W, C); three channels are drawn as RGB.
    """
    largest = np.percentile(np.abs(gradient), 99.5) or np.abs(gradient).max() or 1.0
    values = (gradient / largest).clip(-1, 1)
    return _rgb((127.5 + 127.5 * values).round().astype(np.uint8))


def side_by_side(
    panels: Sequence[tuple[PIL.Image.Image, str]], title: str, side: int = 320, smooth: bool = True
) -> PIL.Image.Image:
    """Return a picture of panels in a row, with a title above and a caption under each.

    Args:
      panels: pairs of an image and its caption.
      title: the line above; it is shortened to the picture's width, as are the captions.
      side: the smallest width of a panel in pixels; smaller images are enlarged to it.
      smooth: interpolate when an image is enlarged; else every pixel is a square.
    """
    resampling = PIL.Image.Resampling.BICUBIC if smooth else PIL.Image.Resampling.NEAREST
    factor = max(1.0, *(side / image.width for image, _ in panels))
    images = [
        image.resize((round(image.width * factor), round(image.height * factor)), resampling) for image, _ in panels
    ]
    font, line = PIL.ImageFont.load_default(FONT_SIZE), FONT_SIZE + MARGIN
    width = sum(image.width for image in images) + MARGIN * (len(images) + 1)
    height = max(image.height for image in images) + 2 * line + 2 * MARGIN
    picture = PIL.Image.new("RGB", (width, height), "white")
    draw = PIL.ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), _shortened(title, font, width - 2 * MARGIN), "black", font)
    left = MARGIN
    for image, (_, caption) in zip(images, panels, strict=True):
        picture.paste(image, (left, MARGIN + line))
        below = MARGIN + line + image.height + MARGIN // 2
        draw.text((left, below), _shortened(caption, font, image.width), "black", font)
        left += image.width + MARGIN
    return picture


def _shortened(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _colors(values: np.ndarray, scale: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the color of each value from 0 to 1 (H, W), between evenly spaced colors: (H, W, 3) floats."""
    places = np.linspace(0, 1, len(scale))
    return np.stack([np.interp(values, places, channel) for channel in zip(*scale, strict=True)], -1)


def _blend(pixels: np.ndarray, colors: np.ndarray, opacity: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray((pixels * (1 - opacity) + colors * opacity).round().astype(np.uint8))


def _rgb(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
