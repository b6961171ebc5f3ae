"""A network with its weights, its preprocessing and the names of its classes."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Array, Float

from vgg_jax.console import note
from vgg_jax.data.image_files import read_image
from vgg_jax.data.listing import Image, Path, find_images
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.embedding_files import Embeddings
from vgg_jax.evaluation.extraction import embeddings
from vgg_jax.evaluation.optimized import NetworkPrograms
from vgg_jax.evaluation.programs import CompiledAhead
from vgg_jax.model import VGG
from vgg_jax.runtime import placed
from vgg_jax.sources import read_source
from vgg_jax.weights.formats import Loaded, without_head
from vgg_jax.weights.imagenet_classes import imagenet_classes as imagenet_classes
from vgg_jax.weights.metadata import OUTPUTS


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image or, if the outputs are values, the numbers; or the reason for neither."""

    image: str  # the path, or "image 3" for the fourth of several in memory
    labels: tuple[int, ...] = ()  # the most probable first; for values, all outputs in their order
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()  # of a softmax or, for sigmoid outputs, each for itself; empty for values
    values: tuple[float, ...] = ()  # empty for softmax and sigmoid
    error: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network, ready to use: `net(images)` gives logits, `net.predict("photo.jpg")` gives classes.

    Flax's functional interface takes `net.model` and `net.variables`. `dataclasses.replace` changes a field.

    Raises:
      UserError: if the crop of the preprocessing is not one of `sides`.
    """

    model: VGG
    variables: Mapping[str, Any] = dataclasses.field(repr=False)
    preprocessing: Preprocessing | None  # of the images; None if it is unknown
    classes: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)  # the names, if they are known
    outputs: str = "softmax"  # what the logits mean: softmax, sigmoid or values
    source: str = "the network"  # where it was loaded from, for messages
    sides: range | None = None  # sides of square images for which the network is defined; None: any

    def __post_init__(self) -> None:
        if self.preprocessing is not None and self.sides is not None and self.preprocessing.crop not in self.sides:
            raise UserError(
                f"{self.source} takes images of {self.sides[0]} to {self.sides[-1]} pixels a side; found a "
                f"preprocessing that crops {self.preprocessing.crop}: use the size of its training: add --resize SIDE "
                "--crop SIDE (in Python: dataclasses.replace(vgg_jax.AUTHORS, resize=SIDE, crop=SIDE))"
            )

    def preprocess(self, image: Image) -> Float[np.ndarray, "h w c"]:
        """Return an image as the network expects it: resized, cropped and normalized.

        Args:
          image: a path, a PIL image, or a uint8 array: (H, W), or (H, W, C) with 1, 3 or 4 channels.

        Returns:
          (H, W, C) float32, with the height, width and channels of the preprocessing.

        Raises:
          UserError: if the image cannot be read, the array is of another kind, or the preprocessing is unknown or does
            not give the channels that the network takes.
        """
        preprocessing = self.checked_preprocessing()
        if isinstance(image, str | os.PathLike):
            image = os.fspath(image)
        return read_image(image if isinstance(image, str | PIL.Image.Image) else _to_pil(image), preprocessing)

    def __call__(self, images: Float[Array | np.ndarray, "n h w c"]) -> Float[Array, "n *output"]:
        """Return the logits of preprocessed images. The function is compiled once for each shape.

        Args:
          images: (N, H, W, C) floats, as `preprocess` returns them.

        Returns:
          (N, num_classes) logits in at least float32; for a network without classes, the output of its last layer:
          (N, width), or (N, H', W', C) if `model.final_layer` ends it.

        Raises:
          ValueError: if the images are too small, or not floats with four axes.
        """
        logits: jax.Array = self._programs.logits(self.variables, placed(images))
        return logits

    def predict(self, images: Image | Sequence[Image], top: int = 5, batch_size: int = 32) -> list[Prediction]:
        """Return the most probable classes of each image or, if the outputs are values, all of them.

        Args:
          images: one or several of: a path of an image or of a folder of images, a PIL image, a uint8 array (see
            `preprocess`). An array with four axes is a batch.
          top: the number of classes.
          batch_size: the number of images that are computed together.

        Returns:
          One prediction for each image. For a file that is not an image, its `error` says why.

        Raises:
          UserError: if `top` or `batch_size` is less than 1, a folder has no images, the network has no classes or a
            softmax of one output, its preprocessing is unknown, or an image in memory cannot be used.
        """
        return list(self.iter_predictions(images, top, batch_size))

    def iter_predictions(
        self, images: Image | Sequence[Image], top: int = 5, batch_size: int = 32, ahead: CompiledAhead | None = None
    ) -> Iterator[Prediction]:
        """Return an iterator over the predictions, which are computed batch by batch.

        Args:
          images: as for `predict`.
          top: as for `predict`.
          batch_size: as for `predict`.
          ahead: the program, if its compilation has begun.

        Raises:
          UserError: as `predict` does.
        """
        for name, number in (("top", top), ("batch_size", batch_size)):
            if number < 1:
                raise UserError(f"{name} is {number}; expected 1 or more")
        found = find_images(images)
        self.check_has_classes()
        preprocessing = self.checked_preprocessing()
        if self.model.num_classes == 1 and self.outputs == "softmax":
            raise UserError(
                f"{self.source} has one output, whose softmax is always 1; expected a probability or a number: pass "
                "outputs='sigmoid' or 'values' to vgg_jax.load, or --outputs to the command"
            )
        batches = (found[start : start + batch_size] for start in range(0, len(found), batch_size))
        shape = (min(len(found), batch_size), *(preprocessing.crop,) * 2, len(preprocessing.mean))
        program = ahead.program_of(self) if ahead else None
        outputs = self._programs.predictions(self.outputs, len(found), shape, program)
        return (prediction for batch in batches for prediction in self._predict_batch(outputs, batch, top))

    def features(
        self, images: Float[Array | np.ndarray, "n h w c"] | Path | Sequence[Path], layers: str | Sequence[str]
    ) -> dict[str, Float[Array | np.ndarray, "n ..."]]:
        """Return named activations of images. The function is compiled once for each shape.

        Args:
          images: (N, H, W, C) floats, as `preprocess` returns them; or paths of image files and folders of them.
          layers: names from `net.model.layer_names`: conv1_1 is before the ReLU, relu1_1 after it.

        Returns:
          From each name to (N, H', W', C') or (N, C') as `features.layer_activations`; for paths, float32 of NumPy.

        Raises:
          UserError: if a name is not a layer of the network, a path cannot be read, or its preprocessing is unknown.
          ValueError: if an array is too small, or not floats with four axes.
        """
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        if not hasattr(images, "ndim"):
            return {**self.embeddings(images, names, pool="none", all_readable=True).features}
        found: dict[str, Array | np.ndarray] = self._programs.activations(self.variables, placed(images), names)
        return found

    def embeddings(self, source: Path | Sequence[Path], layers: str | Sequence[str], **options: Any) -> Embeddings:
        """Return the features of many images, with their names and labels, as `vgg-jax extract` computes them.

        `source`, `layers`, the options and the errors are those of `evaluation.extraction.embeddings`.
        """
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        return embeddings(self.model, self.variables, self.checked_preprocessing(), source, names, **options)

    def save(self, path: Path, **options: Any) -> None:
        """Save the network with its fields, preprocessing, class names and outputs.

        Print a note for what was changed, and for what the format cannot hold.

        Args:
          path: a .safetensors, .pth, .weights.h5, .onnx or .stablehlo file, which is overwritten if it exists; or a
            folder in timm's shape, missing or empty: a path that ends in a slash, is a folder or has no suffix.
          **options: for .onnx the fields of `export.onnx_options.OnnxOptions`, for .stablehlo those of
            `export.stablehlo.save_stablehlo`, for a folder those of `export.folders.write_folder`.

        Raises:
          UserError: if the suffix is another, the format has no such network, a package is missing, or writing fails.
        """
        from vgg_jax.export.targets import save_network  # here, because its import is slow

        for line in save_network(path, self.loaded, **options):
            note(f"{os.fspath(path)}: {line}")

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Upload the network to `repo` on the Hugging Face hub as `export.hub.push` does; return the commit's URL."""
        from vgg_jax.export.hub import push

        url, notes = push(repo, self.loaded, **options)
        for line in notes:
            note(f"{repo}: {line}")
        return url

    def to_nnx(self, rngs: Any = None) -> Any:
        """Return the network as a module of Flax's NNX; `rngs` is that of `vgg_jax.export.nnx.to_nnx`."""
        from vgg_jax.export.nnx import to_nnx  # here, because it imports all of NNX

        return to_nnx(self.model, self.variables, rngs)

    def checked_preprocessing(self) -> Preprocessing:
        """Return the preprocessing; raise UserError if it is unknown or gives other channels than the network takes."""
        if self.preprocessing is None:
            raise UserError(
                f"{self.source} does not state the preprocessing of its images; expected that of its training: pass "
                "--preprocessing imagenet, authors or cifar10, or --mean, --std, --resize, --crop and --channel-order "
                "(in Python: load(..., preprocessing=vgg_jax.IMAGENET) or another)"
            )
        channels = self.variables["params"]["conv1_1"]["kernel"].shape[2]
        if channels != len(self.preprocessing.mean):
            raise UserError(
                f"{self.source} takes images of {channels} channel(s), and its preprocessing gives "
                f"{len(self.preprocessing.mean)}; expected that of its training: use a run's directory or a "
                ".safetensors file that vgg_jax wrote, or pass preprocessing to vgg_jax.load"
            )
        return self.preprocessing

    def check_has_classes(self) -> None:
        """Raise UserError if the network has no classes, so that it cannot be asked for any."""
        if self.model.num_classes is None:
            raise UserError(
                f"{self.source} holds features only; expected a network with classes: use a file that has the last "
                "dense layer, or compute features in Python with vgg_jax.load(...).features"
            )

    @property
    def loaded(self) -> Loaded:
        """Return the network as the functions that write files take it."""
        return Loaded(self.model, self.variables, self.preprocessing, self.classes, self.outputs, sides=self.sides)

    @functools.cached_property
    def _programs(self) -> NetworkPrograms:
        return NetworkPrograms(self.model)

    def _predict_batch(self, outputs: Any, images: Sequence[tuple[str, Image]], top: int) -> Iterator[Prediction]:
        inputs, errors = [], {}
        for name, image in images:
            try:
                inputs.append(self.preprocess(image))
            except UserError as error:
                if not isinstance(image, str):
                    raise
                errors[name] = str(error)
        if inputs:
            # All batches but the last have one shape, unless they have errors: few shapes, so few compilations.
            rows = iter(np.asarray(outputs(self.variables, placed(np.stack(inputs)))))
        for name, _ in images:
            if name in errors:
                yield Prediction(name, error=errors[name])
                continue
            row = next(rows)
            is_value = self.outputs == "values"
            best = [int(i) for i in (range(len(row)) if is_value else np.argsort(-row, kind="stable")[:top])]
            names = tuple(self.classes[i] if self.classes else str(i) for i in best)
            numbers = tuple(float(row[i]) for i in best)
            probabilities, values = ((), numbers) if is_value else (numbers, ())
            yield Prediction(name, tuple(best), names, probabilities, values)


def load(
    source: Path,
    *,
    features_only: bool = False,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    outputs: str | None = None,
    step: str | int = "latest",
    announce: Callable[[Network], None] | None = None,
) -> Network:
    """Load a network.

    Args:
      source: the name of a pretrained network (see `weights.download.load_pretrained`), a file of weights (.pth,
        .safetensors, Keras' .h5 or .keras, ONNX), the directory of a training run, a folder in timm's shape, or a
        repository of the Hugging Face hub, hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION.
      features_only: drop the head, and names that belong to no known head. The convolutional part of a pretrained
        network is cached in a file of its own, which later calls read alone: 59 MB of VGG-16 instead of 553.
      preprocessing: the preprocessing of the network's images, in place of that of the source. By default that of the
        source, or None if the source does not state it: then whatever needs it raises UserError.
      classes: the names of the classes, in place of those of the source. By default those of the source, or None.
      outputs: what the logits mean: softmax, sigmoid or values. By default that of the source, else softmax.
      step: the checkpoint of a run: latest, best (by the accuracy or rmse of its evaluation) or the number of a step.
      announce: called with the network before its weights are read; instead of arrays it has jax.ShapeDtypeStruct. It
        is not called for a run and for Keras' files.

    Returns:
      The network.

    Raises:
      UserError: if the source is missing, unreachable or damaged, is not a VGG, or has another number of classes or no
        such step; if the preprocessing or the outputs are not valid; or if a package that reads it is not installed.
    """
    source = os.fspath(source)
    if outputs not in (None, *OUTPUTS):
        raise UserError(f"outputs is {outputs!r}; expected one of {', '.join(OUTPUTS)}")
    if preprocessing is not None:
        preprocessing.check()

    def network(loaded: Loaded) -> Network:
        return _network(loaded, source, features_only, preprocessing, classes, outputs)

    loaded = read_source(source, features_only, step, announce and (lambda loaded: announce(network(loaded))))
    for line in loaded.notes:
        note(f"{source}: {line}")
    return network(loaded)


def _network(
    loaded: Loaded,
    source: str,
    features_only: bool,
    preprocessing: Preprocessing | None,
    classes: Sequence[str] | None,
    outputs: str | None,
) -> Network:
    """Return the network of a file, with what the caller of `load` has passed in place of what the file states."""
    loaded = without_head(loaded) if features_only else loaded
    model = loaded.model
    classes = loaded.classes if classes is None else classes
    if classes is not None and len(classes) != (model.num_classes or 0):
        raise UserError(
            f"{source} has {model.num_classes or 'no'} classes; found {len(classes)} names: pass a name for each class"
        )
    names = None if classes is None else tuple(classes)
    stated, outputs = preprocessing or loaded.preprocessing, outputs or loaded.outputs or "softmax"
    return Network(model, loaded.variables, stated, names, outputs, source, loaded.sides)


def _to_pil(pixels: np.ndarray) -> PIL.Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise UserError(
            f"found an array of {pixels.dtype} and shape {pixels.shape}; expected uint8 and (H, W) or (H, W, C) with "
            "1, 3 or 4 channels: convert it, or call the network itself with preprocessed images"
        )
    return PIL.Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
