"""The evaluation of a split of photographs of many sizes: padded buckets, several devices, corrupt images."""

import contextlib
import dataclasses
import logging
import re

import jax
import numpy as np
import PIL.Image
import pytest

from tests.conftest import photographs, raises_user_error, random_variables
from vgg_jax import VGG
from vgg_jax.data.dataset import CorruptImageError
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.evaluation import batches, protocols
from vgg_jax.evaluation.buckets import choose_buckets, fitting_bucket
from vgg_jax.evaluation.posteriors import distinct_crops, evaluate_split, normalized
from vgg_jax.evaluation.protocols import PROTOCOLS

pytestmark = pytest.mark.usefixtures("narrow")

PREPARE = Preprocessing(resize=36, crop=32)
SCALES = ("36", 36, (32, 41))
HEAD = dict(pool_size=2, hidden=(16, 16), num_classes=5, pool_after=(1, 2, 3, 4))


@dataclasses.dataclass
class Photographs:
    """A split of photographs in memory; a photograph that is None is corrupt."""

    images: list
    name: str = "photographs/test"
    num_classes: int = 5
    channels: int = 3
    label_shape: tuple = ()

    def __len__(self):
        return len(self.images)

    def image(self, index):
        if self.images[index] is None:
            raise CorruptImageError(f"example {index}: the image cannot be decoded")
        return self.images[index], index % 5

    def size(self, index):
        return self.image(index)[0].size[::-1]


def small_photographs(count):
    """Return photographs of odd sizes, upright and lying, and a panorama."""
    images = [photo.resize((photo.width // 4, photo.height // 4)) for photo in photographs(count)]
    return [*images[1:], images[0].resize((170, 37))]


def network(dtype=np.float32, **fields):
    """Return a network with a random bias in every layer, so that padding is not zero after a convolution."""
    model = VGG(**{"depth": 11, **HEAD, **fields}, dtype=dtype, param_dtype=dtype)
    random = np.random.default_rng(1)

    def moved(path, leaf):
        if path[-1].key in ("bias", "mean"):
            return leaf + random.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
        return leaf * 20 if path[-2].key.startswith("fc") else leaf

    return model, jax.tree.map_with_path(moved, random_variables(model, 32, 32, 3))


def evaluated(model, variables, images, names=PROTOCOLS, **options):
    results = evaluate_split(model, variables, PREPARE, Photographs(images), names, SCALES, 4, **options)
    return {result.protocol: result for result in results}


@contextlib.contextmanager
def compiled_functions(caplog):
    """Collect the names of the functions that JAX compiles."""
    names = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield names
    names += re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)


COLUMNS = {
    "A-LRN with rematerialization": dict(lrn=True, remat=True),
    "C with batch norm": dict(depth=16, conv1x1=True, batch_norm=True),
    "five pools": dict(pool_after=(1, 2, 3, 4, 5), pool_size=1, hidden=()),
    "timm's head": dict(conv_head=True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(f, id=name, marks=[pytest.mark.slow] if name.startswith("A-LRN") else [])
        for name, f in COLUMNS.items()
    ],
)
def test_padded_scores_equal_those_without_padding(fields):
    """Odd sizes in one batch; the padding is NaN, so that nothing of it can have an influence."""
    model, variables = network(np.float64, **fields)
    random = np.random.default_rng(0)
    images = [random.normal(size=(height, width, 3)) for height, width in ((33, 61), (47, 32))]
    padded = np.full((2, 52, 61, 3), np.nan)
    for image, row in zip(images, padded, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    sizes = np.array([image.shape[:2] for image in images])
    both = jax.jit(protocols.dense_posteriors, static_argnums=(0, 3))(model, variables, padded, "values", sizes)
    for image, found in zip(images, both, strict=True):
        alone = protocols.dense_posteriors(model, variables, image[None], "values")[0]
        np.testing.assert_allclose(found, alone, rtol=1e-12, atol=1e-12 * np.abs(alone).max())


def test_a_split_has_the_posteriors_of_each_image_alone():
    """All protocols of photographs of many sizes on several devices, compared with one image at a time."""
    model, variables = network()
    images = small_photographs(3)
    results = evaluated(model, variables, images)
    dense, center = (jax.jit(f, static_argnums=0) for f in (protocols.dense_posteriors, protocols.center_posteriors))
    for i, image in enumerate(images):
        single, *whole = [
            dense(model, variables, PREPARE.uncropped(image, q)[None])[0] for q in (SCALES[1], *SCALES[2])
        ]
        crops = []
        for q in SCALES[2]:
            views = protocols.grid_crops(PREPARE.uncropped(image, q), 32)
            crops.append(center(model, variables, np.concatenate([views, views[:, :, ::-1]])).mean(0))
        expected = {
            "center_crop": center(model, variables, PREPARE(image)[None])[0],
            "dense": single,
            "multi_scale": np.mean(whole, 0),
            "multi_crop": np.mean(crops, 0),
            "dense+multi_crop": np.mean(whole + crops, 0),
        }
        for name, posteriors in expected.items():
            np.testing.assert_allclose(results[name].posteriors[i], posteriors, rtol=0, atol=1e-6)
    assert results["dense"].posteriors.std(0).max() > 0.05
    assert results["dense"].labels.tolist() == [0, 1, 2]


def test_all_protocols_compile_at_most_twelve_programs(caplog):
    """Each of 40 photographs has another size at each scale."""
    model, variables = network(pool_after=(1, 2, 3, 4, 5), pool_size=1, hidden=())
    random = np.random.default_rng(0)
    images = [PIL.Image.new("RGB", tuple(map(int, random.integers(20, 90, 2)))) for _ in range(40)]
    with compiled_functions(caplog) as names:
        evaluated(model, variables, images)
    assert names.count("center") == names.count("crops") == 1
    assert 1 <= names.count("dense") <= 10
    assert len(names) <= 12, names


def test_each_image_is_decoded_once_for_all_protocols(monkeypatch):
    decoded, tiles = [], []
    image = Photographs.image
    monkeypatch.setattr(Photographs, "image", lambda split, index: (decoded.append(index), image(split, index))[1])
    monkeypatch.setattr(Photographs, "size", lambda split, index: split.images[index].size[::-1])
    monkeypatch.setattr("vgg_jax.evaluation.posteriors.add_posteriors", lambda *arguments: tiles.extend(arguments[3]))
    evaluated(*network(), small_photographs(4))
    assert sorted(decoded) == [0, 1, 2, 3]
    assert {scale for view, scale in {tile.part for tile in tiles} if view == "dense"} == {32, 36, 41}
    assert {scale for view, scale in {tile.part for tile in tiles} if view == "multi_crop"} == {32, 41}


def test_the_number_of_devices_does_not_change_posteriors(monkeypatch):
    model, variables = network()
    images = small_photographs(5)
    names = ("dense", "center_crop")
    many = evaluated(model, variables, images, names, flip=True)
    monkeypatch.setattr(batches.jax, "local_devices", lambda: jax.devices()[:1])
    one = evaluated(model, variables, images, names, flip=True)
    for name, result in one.items():
        np.testing.assert_allclose(many[name].posteriors, result.posteriors, rtol=0, atol=1e-6)


def test_devices_exchange_nothing():
    """The images of a batch stay on their devices, with their horizontal flips."""
    model, variables = network()
    mesh = batches.local_mesh(8)
    placed = batches.replicated(variables, mesh)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    images, sizes = jax.device_put((np.zeros((8, 48, 64, 3), np.uint8), np.full((8, 2), 40)), rows)

    def dense(variables, images, sizes):
        return protocols.dense_posteriors(model, variables, normalized(images, PREPARE), "softmax", sizes)

    text = jax.jit(dense).lower(placed, images, sizes).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def test_corrupt_images_are_left_out_on_request(capsys):
    model, variables = network()
    images = small_photographs(4)
    damaged = [images[0], None, *images[1:]]
    with raises_user_error("example 1: the image cannot be decoded; replace or remove it"):
        evaluated(model, variables, damaged)
    whole = evaluated(model, variables, images, ("dense", "center_crop"))
    rest = evaluated(model, variables, damaged, ("dense", "center_crop"), skip_corrupt=True)
    for name, result in rest.items():
        np.testing.assert_allclose(result.posteriors, whole[name].posteriors, rtol=0, atol=1e-6)
        assert result.labels.tolist() == [0, 2, 3, 4]
    assert capsys.readouterr().err.count("skipped corrupt image 1: example 1") == 1
    with raises_user_error("photographs/test has more than 1 corrupt images"):
        evaluated(model, variables, [None, None], ("center_crop",), skip_corrupt=True)


def test_buckets_hold_all_sizes_with_little_padding():
    random = np.random.default_rng(0)
    sizes = [(256, 256 + int(n)) for n in random.integers(0, 200, 500)]
    sizes += [(width, height) for height, width in sizes[:200]] + [(224, 2000)]
    buckets = choose_buckets(sizes * 100, most=6)
    assert len(buckets) <= 6
    chosen = [fitting_bucket(buckets, size) for size in sizes]
    assert sum(h * w for h, w in chosen) < 1.2 * sum(h * w for h, w in sizes)
    assert chosen[-1] == (224, 2000)
    assert choose_buckets([(32, 32)] * 50 + [(40, 40)]) == [(40, 40)]  # a second program would not pay
    with pytest.raises(ValueError, match="fits into one of"):
        fitting_bucket(buckets, (300, 3000))


def test_batches_divide_a_bucket_evenly():
    assert batches.batch_sizes({(10, 10): 17}, 1600, 1) == {(10, 10): 9}
    assert batches.batch_sizes({(10, 10): 17}, 100, 8) == {(10, 10): 8}
    assert batches.batch_sizes({(50, 50): 3, (10, 10): 1}, 1600, 2) == {(50, 50): 2, (10, 10): 2}


def test_coinciding_crops_are_computed_once():
    image = np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)
    crops = distinct_crops(image, 32)
    assert len(crops) == 10  # of the rows 0, 0, 1, 1, 1
    mean = sum(share * crop.astype(float) for crop, share in crops)
    np.testing.assert_allclose(mean, protocols.grid_crops(image, 32).mean(0))
