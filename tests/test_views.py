"""Views of images: to the pixel as torchvision's for tests, of the stated distributions for training."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.archives import encoded
from tests.conftest import photographs
from vgg_jax import statistics
from vgg_jax.config import Config, DataConfig, validate
from vgg_jax.data import views
from vgg_jax.data.augmentation import augment, color_shift, normalize, random_crop, random_flip

# --- views


def test_test_views_are_torchvisions_to_the_pixel(torchvision):
    transforms = torchvision.transforms
    for resize, size in ((256, 224), (232, 224), (97, 65)):
        reference = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        for image in photographs(50):
            ours = views.centre_crop(views.resize_short_side(image, resize), size)
            np.testing.assert_array_equal(ours, np.asarray(reference(image)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_gives_pillows_pixels(mode):
    photo = photographs(1)[0]
    files = {
        "JPEG": encoded(photo, quality=95),
        "subsampled": encoded(photo, quality=70),
        "progressive": encoded(photo, progressive=True),
        "grey": encoded(photo.convert("L")),
        "CMYK": encoded(photo.convert("CMYK")),
        "PNG": encoded(photo, "PNG"),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "grey and alpha": encoded(photo.convert("LA"), "PNG"),
        "16 bit": encoded(PIL.Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        "a byte too many": encoded(photo, quality=95) + b"x",
    }
    for name, data in files.items():
        expected = np.asarray(views.to_mode(PIL.Image.open(io.BytesIO(data)), mode))
        decoded = views.decode(data, mode)
        assert decoded.shape == (*photo.size[::-1], len(mode)), name
        np.testing.assert_array_equal(decoded, expected.reshape(decoded.shape), err_msg=name)


def test_a_resized_part_is_pillows_within_one_level():
    """Both of what a crop shows alone, and of what it shows of a whole image resized."""
    for i, photo in enumerate(photographs(10)):
        pixels = np.asarray(photo)
        width, height = photo.width // 2 + i, photo.height // 3 + 7 * i
        ours = views._resize_part(pixels[i : i + height, 5 : 5 + width], (0, 0, width, height), 64)
        expected = photo.crop((5, i, 5 + width, i + height)).resize((64, 64), views.BILINEAR)
        np.testing.assert_allclose(ours.astype(int), np.asarray(expected), atol=1)

        side = 70 + 20 * i
        random = views._generator(0, i)
        random.integers(side, side + 1)
        whole = views.resize_short_side(photo, side)
        left, top = int(random.integers(whole.width - 64 + 1)), int(random.integers(whole.height - 64 + 1))
        ours = views.scale_crop(pixels, 64, side, side, 0, i)
        expected = np.asarray(whole.crop((left, top, left + 64, top + 64)))
        np.testing.assert_allclose(ours.astype(int), expected, atol=1)


# The distributions are tested on an image whose colours are its coordinates. Each test is of fixed seeds; of other
# seeds one in a million would fail.
RARE = 1e-6


def coordinates(height, width):
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([rows, columns, 0 * rows], -1).round().astype(np.uint8)


def extent(crop, axis, length):
    """The first and the last coordinate, in pixels of the whole, that the middle of a crop shows; and the slope."""
    profile = crop[4:-4, 4:-4, axis].astype(float).mean(1 - axis) / 255 * (length - 1)
    slope, start = np.polyfit(np.arange(4, 4 + len(profile)) + 0.5, profile + 0.5, 1)
    return start, start + slope * len(crop), slope


def assert_uniform(values, low, high):
    from scipy.stats import kstest

    assert kstest((np.array(values) - low) / (high - low), "uniform").pvalue > RARE


def test_scale_crop_draws_the_scale_and_the_place_uniformly():
    height, width, size = 240, 320, 64
    image = coordinates(height, width)
    scales, lefts, tops = [], [], []
    for position in range(1000):
        crop = views.scale_crop(image, size, 80, 160, 0, position)
        top, _, slope = extent(crop, 0, height)
        left, _, _ = extent(crop, 1, width)
        scales.append(height / slope)
        tops.append(top / (height - slope * size))
        lefts.append(left / (width - slope * size))
    assert 79 < min(scales) < 82  # fitted to within half a pixel or so
    assert 158 < max(scales) < 161
    assert_uniform(scales, 79.5, 160.5)
    assert_uniform(lefts, 0, 1)
    assert_uniform(tops, 0, 1)
    fixed = [height / extent(views.scale_crop(image, size, 100, 100, 0, i), 0, height)[2] for i in range(20)]
    np.testing.assert_allclose(fixed, 100, atol=1)
    first, again, other_seed, other_place = (
        views.scale_crop(image, size, 80, 160, *k) for k in ((0, 7), (0, 7), (1, 7), (0, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other_seed).any()
    assert (first != other_place).any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (333, 500), (257, 331), (224, 224)])
def test_crops_at_the_edges_stay_within_the_image(height, width, monkeypatch):
    """The last row and column of every scale, where rounding might pass the edge."""
    image = np.zeros((height, width, 1), np.uint8)

    class AtTheEnd:
        def __init__(self, scale):
            self.scale = scale

        def integers(self, low, high=None):
            return self.scale if high is not None else low - 1

    for scale in range(224, 513):
        monkeypatch.setattr(views, "_generator", lambda seed, position: AtTheEnd(position))
        assert views.scale_crop(image, 224, 224, 512, 0, scale).shape == (224, 224, 1)


def test_random_resized_crop_follows_torchvisions_distribution(torchvision):
    """Areas and aspects beside torchvision's own parameters, by the two-sample test of Kolmogorov and Smirnov."""
    import torch
    from scipy.stats import ks_2samp

    height, width = 300, 400
    image = coordinates(height, width)
    areas, aspects, lefts = [], [], []
    for position in range(1000):
        crop = views.random_resized_crop(image, 48, 0, position)
        (left, right, _), (top, bottom, _) = extent(crop, 1, width), extent(crop, 0, height)
        areas.append((right - left) * (bottom - top) / (height * width))
        aspects.append(np.log((right - left) / (bottom - top)))
        lefts.append(left / width)
    torch.manual_seed(0)
    of_torch = [
        torchvision.transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.08, 1.0), (3 / 4, 4 / 3))
        for _ in range(1000)
    ]
    for ours, theirs in (
        (areas, [h * w / (height * width) for _, _, h, w in of_torch]),
        (aspects, [np.log(w / h) for _, _, h, w in of_torch]),
        (lefts, [left / width for _, left, _, _ in of_torch]),
    ):
        assert ks_2samp(ours, theirs).pvalue > RARE
    assert min(areas) < 0.1
    assert max(areas) > 0.95
    np.testing.assert_array_equal(*(views.random_resized_crop(image, 32, 0, 7) for _ in range(2)))


# --- augmentation on the device


def test_random_crop_shifts_by_every_offset_and_fills_with_zeros():
    image = np.arange(1, 37, dtype=np.uint8).reshape(6, 6, 1)
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(np.stack([image] * 2000)), 2))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    expected = {padded[i : i + 6, j : j + 6].tobytes(): (i, j) for i in range(5) for j in range(5)}
    counts = np.zeros((5, 5))
    for crop in crops:
        counts[expected[crop.tobytes()]] += 1
    # 25 equally likely offsets: 80 each; chi-square with 24 degrees of freedom exceeds 60 once in 16,000.
    assert ((counts - 80) ** 2 / 80).sum() < 60


def test_random_flip_mirrors_half():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    images = np.asarray(random_flip(jax.random.key(1), jnp.asarray(np.stack([image] * 2000))))
    flipped = (images == image[:, ::-1]).all((1, 2, 3))
    assert ((images == image).all((1, 2, 3)) ^ flipped).all()
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)  # five standard errors


def test_normalisation_is_torchvisions(torchvision):
    import torch

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    expected = torchvision.transforms.Normalize(mean, std)(tensor).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(normalize(jnp.asarray(images), mean, std), expected, atol=1e-6)  # float32 rounding


def test_colour_shift_is_normal_along_the_principal_axes():
    config = DataConfig()
    values, vectors = np.array(config.color_eigenvalues), np.array(config.color_eigenvectors)
    n = 20_000
    shifts = np.asarray(color_shift(jax.random.key(0), n, 0.1, config.color_eigenvalues, config.color_eigenvectors))
    assert shifts.shape == (n, 1, 1, 3)
    alphas = shifts[:, 0, 0] @ np.linalg.inv(vectors.T) / values  # what each axis was multiplied by
    from scipy.stats import kstest

    for alpha in alphas.T:
        assert kstest(alpha / 0.1, "norm").pvalue > RARE
    assert np.abs(np.corrcoef(alphas.T) - np.eye(3)).max() < 5 / np.sqrt(n)  # five standard errors


def test_the_shift_is_one_colour_for_each_image_before_normalisation():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    std = (0.2, 0.3, 0.4)
    config = DataConfig(pad=0, flip=False, mean=(0.1, 0.2, 0.3), std=std, color_shift=0.1)
    shift = (augment(jax.random.key(0), images, config) - normalize(images, config.mean, std)) * jnp.array(std)
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)  # float32 rounding
    assert len(np.unique(np.asarray(shift[:, 0, 0]).round(5), axis=0)) == 4


def test_published_colour_constants_are_principal_axes():
    """Published with four digits: orthonormal to that, and of a covariance of pixels in [0, 1]."""
    config = DataConfig()
    vectors = np.array(config.color_eigenvectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    covariance = vectors @ np.diag(config.color_eigenvalues) @ vectors.T
    values, ours = statistics.principal_axes(covariance)
    np.testing.assert_allclose(values, config.color_eigenvalues, atol=1e-4)
    np.testing.assert_allclose(np.abs(ours), np.abs(vectors), atol=0.01)  # the two smaller lie close together
    assert 0.2 < np.sqrt(np.diag(covariance)).mean() < 0.3  # near the published deviations, 0.229, 0.224, 0.225


def test_statistics_of_pixels():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (5 + i, 9, 3)).astype(np.uint8) for i in range(4)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    mean, covariance = statistics.pixel_statistics(images)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(pixels.T, bias=True), rtol=1e-9, atol=1e-15)


def test_the_command_computes_constants_of_the_published_form(tmp_path, monkeypatch, capsys):
    """Of photographs: what it prints is a configuration, its first axis is brightness, as ImageNet's is."""
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for i, photo in enumerate(photographs(6)):
        (tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg").write_bytes(encoded(photo))
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path)])
    assert statistics.main() == 0
    comment, *lines = capsys.readouterr().out.splitlines()
    assert comment == f"# of 6 images of {tmp_path}/train"
    fields = {}
    for line in lines:
        name, _, value = line.removeprefix("--config.data.").partition("=")
        fields[name] = eval(value)
    config = Config(data=DataConfig(**fields, color_shift=0.1))
    validate(config)
    values, vectors = np.array(fields["color_eigenvalues"]), np.array(fields["color_eigenvectors"])
    assert values[0] > values[1] > values[2] > 0
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=5e-4)
    assert (vectors[:, 0] < -0.4).all()


def test_augment_is_a_pure_function_of_its_key():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8))

    def view(seed, **fields):
        return augment(jax.random.key(seed), images, DataConfig(mean=(0.0,) * 3, std=(1 / 255,) * 3, **fields))

    everything = dict(pad=2, flip=True, color_shift=0.1)
    np.testing.assert_array_equal(view(0, **everything), view(0, **everything))
    assert (view(0, **everything) != view(1, **everything)).any()
    np.testing.assert_allclose(view(0, pad=0, flip=False), images, rtol=1e-6)  # divided by 255, and by its inverse
    for train_view in ("random_resized_crop", "scale_crop"):  # which the host crops
        np.testing.assert_array_equal(view(0, train_view=train_view, flip=False), view(0, pad=0, flip=False))
