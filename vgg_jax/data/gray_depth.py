"""Gray images of more than 8 bits: the range of their values, and its scaling to 8 bits."""

import numpy as np
import PIL.Image

from vgg_jax.console import note
from vgg_jax.errors import UserError

# TIFF's tags.
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE = 258, 262, 281, 340, 341
# Formats whose 16 bits are unsigned and use the full range; None: an image in memory. Pillow scales PGM to 16 bits.
SIXTEEN_BITS = ("PNG", "TIFF", "JPEG2000", "PPM", None)
_noted: list[str] = []  # whether this process has printed the remark about 12 bits


class ImageError(UserError):
    """An image that cannot be decoded; the message lacks the image's name."""


def to_eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image in mode I;16, I or F in mode L, scaled from the range that its file states.

    16 bits are scaled by 257. The TIFF tag BitsPerSample, or MaxSampleValue if it is 2^n - 1, states fewer bits, such
    as 12. SMinSampleValue and SMaxSampleValue state the range of 32-bit integers and of floats.

    Raises:
      ImageError: if nothing states the range, or if the values exceed it.
    """
    values = np.asarray(image)
    low, high = _stated_range(image)
    if not (low <= values.min() and values.max() <= high):  # False also for NaN
        raise ImageError(
            f"values from {values.min():g} to {values.max():g}; expected {low:g} to {high:g}, as the file states; "
            "convert it to 8 bits"
        )
    if high == 65535 and 0 < values.max() < 4096 and not _noted:
        _noted.append("12 bits")
        note(
            f"an image of 16-bit gray ({getattr(image, 'filename', '') or f'{image.width} x {image.height} pixels'}) "
            f"has no value above {values.max()}, and is scaled as 16 bits; if its camera has 12 bits or fewer, "
            "convert such images to 8 bits (said once)"
        )
    # For 16 bits the divisor is 257.
    scaled = (values.astype(np.float64) - low) / ((high - low) / 255)
    if _tags(image).get(PHOTOMETRIC) == 0:  # white is zero, which Pillow inverts only for 8 bits
        scaled = 255 - scaled
    return PIL.Image.fromarray(scaled.round().astype(np.uint8))


def _stated_range(image: PIL.Image.Image) -> tuple[float, float]:
    """Return the lowest and the highest value that the file of an image states."""
    tags = _tags(image)
    lowest, highest = (_first(tags.get(tag)) for tag in (S_MIN_SAMPLE, S_MAX_SAMPLE))
    if highest is not None and highest > (lowest or 0):
        return lowest or 0.0, highest
    most = _first(tags.get(MAX_SAMPLE))
    if image.mode != "F" and most is not None and most >= 255 and int(most).bit_count() == int(most).bit_length():
        return 0.0, most
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen and image.format in SIXTEEN_BITS:
        bits = int(_first(tags.get(BITS_PER_SAMPLE)) or 16)
        return 0.0, 2.0**bits - 1
    kind = {"F": "floating-point values", "I": "integers of 32 bits"}.get(image.mode, "values of 16 bits")
    remedy = "convert it to 8 bits"
    if image.format == "TIFF":
        remedy += ", or set the tags SMinSampleValue and SMaxSampleValue"
    raise ImageError(f"{kind} from an unknown range; expected a file that states it; {remedy}")


def _tags(image: PIL.Image.Image) -> dict[int, object]:
    return dict(getattr(image, "tag_v2", {}))


def _first(value: object) -> float | None:
    """Return the number that a tag holds, the first of several."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return float(value) if isinstance(value, int | float) else None
