"""One rule of decoding: the same pixels in training, evaluation and prediction, or a refusal by name in all three."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from PIL import TiffImagePlugin

from tests.conftest import photographs, raises_user_error
from tests.data.archives import encoded
from vgg_jax.data import gray_depth, image_files
from vgg_jax.data.dataset import CorruptImageError, Split
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.data.transforms import Views
from vgg_jax.errors import UserError

PHOTO = photographs(1)[0].crop((10, 20, 80, 70))  # not square, so that a turn shows
GRAY = np.asarray(PHOTO.convert("L"))
TURNS = {i: f"EXIF {i}" for i in range(1, 9)}
FLOAT, SHORT, S_MIN, S_MAX, MAX = 11, 3, 340, 341, 281  # of TIFF


class Records(list):
    def locate(self, index):
        return f"record {index}"


def tiff(array, *tags, **options):
    """Return a TIFF file; each tag is (number, type, value)."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for number, kind, value in tags:
        directory.tagtype[number] = kind
        directory[number] = value
    image = array if isinstance(array, PIL.Image.Image) else PIL.Image.fromarray(array)
    return encoded(image, "TIFF", tiffinfo=directory, **options)


def with_exif(orientation, file_format="JPEG", **options):
    exif = PIL.Image.Exif()
    exif[image_files.ORIENTATION] = orientation
    return encoded(PHOTO, file_format, exif=exif, **options)


def pgm(array, largest):
    return b"P5\n%d %d\n%d\n" % (*array.shape[::-1], largest) + array.astype(">u2").tobytes()


def animated(file_format, **options):
    others = [PHOTO.transpose(PIL.Image.Transpose.ROTATE_180), PIL.Image.new("RGB", PHOTO.size)]
    return encoded(PHOTO, file_format, save_all=True, append_images=others, **options)


def first_frame(data):
    return PIL.Image.open(io.BytesIO(data))


ALPHA = PHOTO.copy()
ALPHA.putalpha(PIL.Image.fromarray(GRAY))
PALETTE = ALPHA.quantize(32)
# Files that Pillow's `exif_transpose` and `convert` decode as they should.
AS_PILLOW = {
    "JPEG": encoded(PHOTO, quality=95),
    "progressive JPEG": encoded(PHOTO, progressive=True),
    "gray JPEG": encoded(PHOTO.convert("L")),
    "CMYK JPEG": encoded(PHOTO.convert("CMYK")),
    "CMYK TIFF": tiff(PHOTO.convert("CMYK")),
    "YCbCr TIFF": tiff(PHOTO.convert("YCbCr")),
    "1 bit PNG": encoded(PHOTO.convert("1"), "PNG"),
    "1 bit TIFF": tiff(PHOTO.convert("1")),
    "palette PNG": encoded(PHOTO.quantize(16), "PNG"),
    "palette and alpha PNG": encoded(PALETTE, "PNG"),
    "gray and alpha PNG": encoded(ALPHA.convert("LA"), "PNG"),
    "alpha PNG": encoded(ALPHA, "PNG"),
    "alpha WebP": encoded(ALPHA, "WEBP", lossless=True),
    "BMP": encoded(PHOTO, "BMP"),
    "PPM": encoded(PHOTO, "PPM"),
    "JPEG 2000": encoded(PHOTO, "JPEG2000"),
    "AVIF": encoded(PHOTO, "AVIF"),
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP", lossless=True),
    "animated PNG": animated("PNG"),
    "TIFF of two pages": animated("TIFF"),
    **{name: with_exif(i) for i, name in TURNS.items()},
    "EXIF 6 in PNG": with_exif(6, "PNG"),
    "EXIF 8 in WebP": with_exif(8, "WEBP"),
    "EXIF 5 in TIFF": with_exif(5, "TIFF"),
    "EXIF 7 in AVIF": with_exif(7, "AVIF"),
    "EXIF 6 in gray JPEG": encoded(PHOTO.convert("L"), exif=first_frame(with_exif(6)).getexif()),
    "orientation in XMP": encoded(PHOTO, xmp=b'<x tiff:Orientation="6"/>'),
    "damaged EXIF": encoded(PHOTO, exif=b"Exif\0\0MM\0*\0\0"),
}
FRACTIONS = (GRAY / 255).astype(np.float32)
# Files whose values Pillow would cut off or read in another range; the right values are those of GRAY.
SCALED = {
    "16 bit PNG": encoded(PIL.Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"),
    "16 bit TIFF": tiff(GRAY.astype(np.uint16) * 257),
    "16 bit TIFF, LZW": tiff(GRAY.astype(np.uint16) * 257, compression="tiff_lzw"),
    "16 bit TIFF, big-endian": tiff(PIL.Image.frombytes("I;16B", PHOTO.size, (GRAY.astype(">u2") * 257).tobytes())),
    "16 bit TIFF, white is zero": tiff(65535 - GRAY.astype(np.uint16) * 257, (262, SHORT, 0)),
    "16 bit PGM": pgm(GRAY.astype(np.uint16) * 257, 65535),
    "12 bit PGM": pgm((GRAY / 255 * 4095).round(), 4095),
    "16 bit JPEG 2000": encoded(PIL.Image.fromarray(GRAY.astype(np.uint16) * 257), "JPEG2000"),
    "12 bits in 16, stated": tiff((GRAY / 255 * 4095).round().astype(np.uint16), (MAX, SHORT, 4095)),
    "32 bit integers, 8 bits stated": tiff(GRAY.astype(np.int32), (MAX, SHORT, 255)),
    "float TIFF, range stated": tiff(FRACTIONS, (S_MIN, FLOAT, 0.0), (S_MAX, FLOAT, 1.0)),
    "float TIFF, another range": tiff(FRACTIONS * 4 - 2, (S_MIN, FLOAT, -2.0), (S_MAX, FLOAT, 2.0)),
}
REFUSED = {
    "float TIFF": (tiff(FRACTIONS), "floating-point values from an unknown range"),
    "32 bit integers": (tiff(GRAY.astype(np.int32)), "integers of 32 bits from an unknown range"),
    "values beyond the stated range": (tiff(FRACTIONS * 9, (S_MAX, FLOAT, 1.0)), "expected 0 to 1, as the file states"),
    "not a number": (tiff(FRACTIONS * np.nan, (S_MAX, FLOAT, 1.0)), "as the file states"),
    "truncated JPEG": (AS_PILLOW["JPEG"][:900], "truncated"),
    "truncated JPEG with EXIF": (with_exif(6)[:900], "truncated"),
    "truncated PNG": (AS_PILLOW["alpha PNG"][:900], ""),
    "truncated GIF": (AS_PILLOW["animated GIF"][:900], "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "needs pillow-heif"),
    "macOS metadata": (b"\0\x05\x16\x07" + bytes(40), "no format that Pillow can open"),
}


def three_ways(data, path, mode="RGB", exif=True):
    """Return the pixels before the resizing in training, evaluation (twice) and prediction, or the four errors."""
    path.write_bytes(data)
    channels = len(mode)
    split = Split("odd/train", Records([{"image": data, "label": 0}]), 1, channels, Views(exif=exif))
    one = (0.5,) * channels
    order = "L" if mode == "L" else "RGB"
    found = {}

    def test_view():
        return Split("odd/train", split.records, 1, channels, Views(50, 50, exif=exif)).test_view(0)[0]

    def predict():
        return image_files.read_image(
            str(path), lambda image: Preprocessing(50, 50, one, one, order, exif).uncropped(image, 50)
        )

    for name, function in {
        "training": lambda: split.pixels(0)[0],
        "evaluation": lambda: np.asarray(split.image(0)[0]).reshape(split.pixels(0)[0].shape),
        "test view": test_view,
        "prediction": predict,
    }.items():
        try:
            found[name] = function()
        except UserError as error:
            found[name] = error
    return found


def assert_equal_three_ways(data, path, mode, expected, exif=True):
    found = three_ways(data, path, mode, exif)
    expected = expected.reshape(*expected.shape[:2], len(mode))
    np.testing.assert_array_equal(found["training"], expected)
    np.testing.assert_array_equal(found["evaluation"], expected)
    image = PIL.Image.fromarray(expected[..., 0] if mode == "L" else expected)
    np.testing.assert_array_equal(found["test view"], image_files.center_crop(image, 50))  # its short side is 50
    np.testing.assert_allclose(found["prediction"], (expected / np.float32(255) - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", AS_PILLOW)
def test_files_decode_as_by_pillow_in_all_three(name, mode, tmp_path):
    image = first_frame(AS_PILLOW[name])
    turned = image if name == "damaged EXIF" else PIL.ImageOps.exif_transpose(image)
    if turned.mode == "P":
        turned = turned.convert("RGBA")  # without a step in between, Pillow warns of the transparency that is lost
    expected = np.asarray(turned.convert("RGB").convert(mode))
    assert_equal_three_ways(AS_PILLOW[name], tmp_path / "image", mode, expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", SCALED)
def test_deep_gray_is_scaled_by_what_the_file_states(name, mode, tmp_path):
    expected = np.stack([GRAY] * 3, -1) if mode == "RGB" else GRAY
    assert_equal_three_ways(SCALED[name], tmp_path / "image", mode, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_files_are_refused_by_name_in_all_three(name, tmp_path):
    data, reason = REFUSED[name]
    path = tmp_path / "image.tif"
    errors = three_ways(data, path)
    assert all(isinstance(error, UserError) for error in errors.values())
    for way in ("training", "evaluation", "test view"):
        assert isinstance(errors[way], CorruptImageError)  # so that corrupt_images=skip counts it
        assert "odd/train, example 0, record 0: the image cannot be decoded: " in str(errors[way])
    assert f"{path}: not a readable image: " in str(errors["prediction"])
    for error in errors.values():
        assert reason in str(error)


@pytest.mark.parametrize("name", [*TURNS.values(), "EXIF 6 in PNG", "orientation in XMP"])
def test_exif_can_be_turned_off(name, tmp_path):
    """The pixels are then those of the file, as torchvision reads them."""
    expected = np.asarray(first_frame(AS_PILLOW[name]).convert("RGB"))
    assert_equal_three_ways(AS_PILLOW[name], tmp_path / "image", "RGB", expected, exif=False)


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_in_memory_become_rgb_and_gray(mode):
    source = {"La": "LA", "LAB": "RGB", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)
    image = PHOTO.quantize(16) if source == "P" else PHOTO.convert(source)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    elif mode != source:
        image = image.convert(mode)
    straight = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode)  # without the premultiplication by alpha
    expected = (image.convert(straight) if straight else image).convert("RGB")
    np.testing.assert_array_equal(image_files.decode(image, "RGB"), expected)
    np.testing.assert_array_equal(image_files.decode(image, "L"), expected.convert("L"))


def test_colors_of_16_bits_lose_their_low_byte(tmp_path):
    """Pillow reads 16-bit RGB as 8 bits, by its high byte."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = np.asarray(PHOTO).astype(">u2") * 256 + 200
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    header = struct.pack(">IIBBBBB", *PHOTO.size, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert_equal_three_ways(data, tmp_path / "image", "RGB", np.asarray(PHOTO))


def test_unstated_twelve_bits_are_noted_once(capsys, monkeypatch, tmp_path):
    """Nothing in the file tells 12 bits from a dark image, so that the scaling by 257 is said."""
    monkeypatch.setattr(gray_depth, "_noted", [])
    data = encoded(PIL.Image.fromarray((GRAY / 255 * 4095).astype(np.uint16)), "PNG")
    for _ in range(2):
        pixels = image_files.decode_file(data, "L")
    assert pixels.max() <= 16
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: an image of 16-bit gray (70 x 50 pixels) has no value above")
    assert "convert such images to 8 bits" in line


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_size_of_a_file_is_that_of_its_pixels(mode, exif, monkeypatch):
    """The header suffices for a color JPEG."""
    image = PIL.Image.fromarray(GRAY.astype(np.uint8)).convert("RGB")
    files = [encoded(image, "PNG"), encoded(image.convert("CMYK"), "JPEG"), encoded(image, "JPEG")[:-200]]
    for orientation in (*range(10), 262):
        tags = PIL.Image.Exif()
        tags[image_files.ORIENTATION] = orientation
        files.append(encoded(image, "JPEG", exif=tags))
    shapes = [image_files.decode_file(data, mode, exif).shape[:2] for data in files[:2] + files[3:]]
    assert [image_files.file_size(data, mode, exif) for data in files[:2] + files[3:]] == shapes
    assert len(set(shapes)) == 1 + exif
    if mode == "RGB":
        monkeypatch.setattr(image_files, "decode_file", None)
        assert image_files.file_size(files[2], mode, exif) == shapes[0]  # the pixels are damaged


def test_too_many_pixels_are_refused_in_all_three(monkeypatch, tmp_path):
    monkeypatch.setattr(image_files, "LARGEST", 3000)
    for name in ("JPEG", "BMP"):
        for error in three_ways(AS_PILLOW[name], tmp_path / "image").values():
            assert "70 x 50 pixels; expected at most 3,000; shrink the image" in str(error)


def test_images_in_memory_of_unknown_range_are_refused():
    with raises_user_error("floating-point values from an unknown range", "convert it to 8 bits"):
        Preprocessing()(PIL.Image.fromarray(FRACTIONS))
    with raises_user_error("integers of 32 bits from an unknown range", "convert it to 8 bits"):
        Preprocessing()(PIL.Image.fromarray(GRAY.astype(np.int32)))
