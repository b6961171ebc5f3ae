"""Image files: one rule of decoding for training, evaluation and prediction, and deterministic views by Pillow."""

import contextlib
import importlib
import io
import math
from collections.abc import Callable

import numpy as np
import PIL.Image

from vgg_jax.data.gray_depth import ImageError, to_eight_bits
from vgg_jax.errors import UserError, require

BILINEAR = PIL.Image.Resampling.BILINEAR
LARGEST = 100_000_000  # most pixels of one image, as its header states them
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange height and width
# The errors of Pillow and of `decode` for a file that is not an intact image.
DECODING_ERRORS = (ImageError, OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


def decode(image: PIL.Image.Image, mode: str, exif: bool = True) -> PIL.Image.Image:
    """Return an image of any mode in RGB or L: the rule of training, evaluation and prediction.

    The conversion is Pillow's `convert`: alpha is dropped, a palette is replaced by its colors, and of an animation the
    first frame is taken. Gray of more than 8 bits is scaled by what the file states, see `to_eight_bits`. Colors become
    gray through RGB.

    Args:
      image: the image, open or in memory.
      mode: RGB or L.
      exif: whether to turn the image by its EXIF orientation.

    Raises:
      ImageError: if the range of the values is unknown.
      OSError, ValueError, SyntaxError or DecompressionBombError, as Pillow: if the image cannot be decoded.
    """
    image.load()  # Pillow turns a TIFF here, whatever `exif` is
    turn = TURNS.get(_orientation(image)) if exif else None
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("P", "PA", "RGBa"):
        image = image.convert("RGBA")
    if mode == "L" and image.mode not in ("1", "L", "LA"):
        image = image.convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def decode_file(data: bytes, mode: str, exif: bool = True) -> np.ndarray:
    """Return the pixels of an image file as `decode`, but faster for JPEGs in mode RGB.

    Args:
      data: contents of the file.
      mode: RGB or L.
      exif: whether to turn the image by its EXIF orientation.

    Returns:
      The pixels, (H, W, C) uint8.

    Raises:
      ImageError, OSError, ValueError, SyntaxError or DecompressionBombError, as `decode`.
      UserError: if simplejpeg is not installed.
    """
    if mode == "RGB":
        simplejpeg = require("simplejpeg", "train")
        try:
            if _jpeg_size(data) is not None:
                pixels = np.asarray(simplejpeg.decode_jpeg(data))
                turn = TURNS.get(_jpeg_orientation(data)) if exif else None
                return pixels if turn is None else np.asarray(PIL.Image.fromarray(pixels).transpose(turn))
        except ValueError:
            pass  # not a JPEG, or a faulty one: Pillow tolerates more faults
    return to_array(decode(open_file(io.BytesIO(data)), mode, exif))


def file_size(data: bytes, mode: str, exif: bool = True) -> tuple[int, int]:
    """Return the height and width of what `decode_file` returns, from the header alone if it is a JPEG in mode RGB.

    Args:
      data: contents of the file.
      mode: RGB or L.
      exif: whether to turn the image by its EXIF orientation.

    Raises:
      The errors of `decode_file`. The header of a damaged JPEG may be intact.
    """
    if mode == "RGB":
        try:
            size = _jpeg_size(data)
            if size is not None:
                return size[::-1] if exif and _jpeg_orientation(data) in SIDEWAYS else size
        except ValueError:
            pass  # not a JPEG, or a faulty one
    height, width = decode_file(data, mode, exif).shape[:2]
    return height, width


def open_file(file: io.BytesIO | io.BufferedReader) -> PIL.Image.Image:
    """Open an image file.

    Raises:
      ImageError: if Pillow knows no such format, or if the image has more than `LARGEST` pixels.
    """
    head = file.read(16)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        register_heif()
    try:
        image = PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        raise ImageError(_unknown_format(head)) from None
    if image.width * image.height > LARGEST:
        raise ImageError(f"{image.width} x {image.height} pixels; expected at most {LARGEST:,}; shrink the image")
    return image


def register_heif() -> None:
    """Enable HEIC in Pillow if the package pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


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


def center_view(pixels: np.ndarray, short_side: int, size: int) -> np.ndarray:
    """Return the same pixels as `center_crop` of `resize_short_side`, in less time.

    Pillow resizes first horizontally, then vertically. Each pass here leaves out the rows or columns that the crop does
    not show. (Pillow's argument `box` does not give the same pixels: it rounds the box to float32.)

    Args:
      pixels: (H, W, C) uint8.
      short_side: short side of the resized image.
      size: side of the crop.

    Returns:
      The center of the resized image, (size, size, C) uint8.
    """
    plane = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    height, width = plane.shape[:2]
    if min(height, width) == short_side:
        return center_crop(PIL.Image.fromarray(plane), size)
    scaled_width, scaled_height = scaled_size((width, height), short_side)
    left, top = round((scaled_width - size) / 2.0), round((scaled_height - size) / 2.0)
    scale = height / scaled_height
    reach = max(scale, 1.0) + 1  # rows of the image above and below that a row of the result depends on
    first = max(0, math.floor(top * scale - reach))
    last = min(height, math.ceil((top + size) * scale + reach))
    image = PIL.Image.fromarray(plane[first:last]).resize((scaled_width, last - first), BILINEAR)
    image = image.crop((left, -first, left + size, height - first))  # the rows left out become zeros
    return to_array(image.resize((size, scaled_height), BILINEAR).crop((0, top, size, top + size)))


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the size, in the order of `size`, at which the short side has `short_side` pixels."""
    short = min(size)
    return int(short_side * size[0] / short), int(short_side * size[1] / short)


def to_array(image: PIL.Image.Image) -> np.ndarray:
    """Return the pixels of an image in mode RGB or L, (H, W, C) uint8."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def read_image(image: str | PIL.Image.Image, view: Callable[[PIL.Image.Image], np.ndarray]) -> np.ndarray:
    """Return `view` of an image file, given its path, or of an image; `view` is a Preprocessing, for example.

    Raises:
      UserError: if the image cannot be decoded, if the range of its values is unknown, or if a file has more than
        `LARGEST` pixels.
    """
    try:
        if isinstance(image, PIL.Image.Image):
            return view(image)
        with open(image, "rb") as file, open_file(file) as opened:
            return view(opened)
    except DECODING_ERRORS as error:
        if isinstance(error, UserError) and not isinstance(error, ImageError):
            raise
        reason = error.strerror or error if isinstance(error, OSError) else error
        name = image if isinstance(image, str) else f"an image of {image.width}x{image.height} pixels"
        raise UserError(f"{name}: not a readable image: {reason}") from None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG before it is turned, or None if only Pillow may decode it.

    Raises:
      ValueError: if the header is not a JPEG's.
      UserError: if simplejpeg is not installed.
    """
    height, width, color_space, _ = require("simplejpeg", "train").decode_jpeg_header(data)
    return (height, width) if color_space in ("YCbCr", "Gray", "RGB") and height * width <= LARGEST else None


def _jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG. Pillow takes 0.1 ms to read it; decoding takes 1 ms and more."""
    return _orientation(PIL.Image.open(io.BytesIO(data))) if _has_app1(data) else 1


def _has_app1(data: bytes) -> bool:
    """Return whether a JPEG has a segment APP1, which holds EXIF or XMP."""
    place = 2
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]) not in (b"\xda", b""):
        if marker == b"\xe1":
            return True
        place += 1 if marker == b"\xff" else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none, or none that can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for damaged EXIF, which is no reason to refuse intact pixels
        return 1


def _unknown_format(head: bytes) -> str:
    """Return the reason why Pillow cannot open a file that begins with `head`."""
    if not head:
        return "the file is empty; replace it"
    if head[4:8] == b"ftyp":
        return (
            "HEIC or a like format, which needs pillow-heif; install it (pip install pillow-heif), or convert to JPEG"
        )
    if head.startswith(b"version https://"):
        return "a text file (a Git LFS pointer); download the image itself"
    return "no format that Pillow can open; replace the file, or convert it to JPEG or PNG"
