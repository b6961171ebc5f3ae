"""The extraction of features into a file, which resumes after the process was killed."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vgg_jax.data.listing import Path, find_images
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.embedding_files import (
    KIND,
    Content,
    Embeddings,
    check_path,
    read_description,
    write_embeddings,
)
from vgg_jax.evaluation.embeddings import Extraction, Features
from vgg_jax.evaluation.image_sources import FileImages, ImageSource, open_source
from vgg_jax.evaluation.parts import MemoryRows, PartFiles
from vgg_jax.evaluation.pooled_features import FeatureOptions
from vgg_jax.model import VGG
from vgg_jax.weights.fingerprint import weights_hash
from vgg_jax.weights.metadata import MODEL_FIELDS

PARTS = ".parts"  # the suffix of the directory of an unfinished extraction
INPUTS = ("weights", "layers", "view", "preprocessing", "images", "network")  # what the features depend on


class Extracted(NamedTuple):
    """What an extraction has written."""

    path: str
    images: int
    unreadable: int
    computed: bool  # False: the file was complete before


def extract(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    source: ImageSource,
    options: FeatureOptions,
    path: str,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> Extracted:
    """Write the features of all readable images of a source to a file.

    Computed features are kept in the directory PATH.parts until the file is complete. A run that is killed and started
    again computes only what is missing; its file equals that of a run that was never killed, bit for bit on one
    machine.

    Args:
      model: the network.
      variables: its variables. Those of layers behind the deepest one named may be missing.
      preprocessing: the preprocessing of its images.
      source: the images.
      options: the choices of the features.
      path: the file; its suffix .npz, .safetensors or .parquet decides the format.
      batch_size: images of the size of the crop that each device computes together. Larger images count by their
        pixels, and horizontal flips count too. By default as many as have the pixels of 16 images of 224x224, at most
        128.
      overwrite: replace the file if it exists, and discard unfinished features of other inputs. By default a file of
        the same inputs is kept, and nothing is computed.

    Returns:
      The path, the numbers of images in the file and of unreadable ones, and whether features were computed.

    Raises:
      UserError: if the network cannot compute the features, no image can be read, the path cannot be written or needs
        pyarrow, another process writes it, or the file or unfinished features have other inputs.

    Source:
      Appendix B of the paper, for whole images at several scales.
    """
    check_path(path)
    extraction = Extraction(model, variables, preprocessing, source, options, batch_size)
    description = _describe(model, variables, preprocessing, source, options)
    if os.path.exists(path) and not overwrite:
        return _complete(path, description)
    fields = {name: description[name] for name in INPUTS}
    fields["view"] = {key: value for key, value in fields["view"].items() if key not in ("combine", "normalize")}
    store = PartFiles(path + PARTS, {**fields, **extraction.key, "jax version": jax.__version__}, overwrite)
    try:
        extraction.compute(store)
        features = Features(extraction.plan, store, options)
        shapes = {layer: features.block(layer, 0, 1).shape[1:] for layer in options.layers}
        description |= {"shapes": shapes, "count": len(features), "unreadable": features.unreadable}
        labels = features.labels() if source.labeled else None
        write_embeddings(path, Content(features, labels, json.loads(json.dumps(description))))
    finally:
        store.close()
    store.remove()
    return Extracted(path, len(features), features.unreadable, True)


def embeddings(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    source: Path | Sequence[Path],
    layers: tuple[str, ...],
    *,
    split: str | None = None,
    data_dir: str = "",
    batch_size: int | None = None,
    all_readable: bool = False,
    **choices: Any,
) -> Embeddings:
    """Return the features of all readable images in memory.

    Args:
      model: the network.
      variables: its variables.
      preprocessing: the preprocessing of its images.
      source: an image, a folder, several of these, or a data set; as for `open_source`.
      layers: names from `model.layer_names`.
      split: the split of a data set.
      data_dir: TFDS's data directory.
      batch_size: as for `extract`.
      all_readable: raise UserError if an image cannot be read.
      **choices: the fields of `FeatureOptions` beside the layers: pool, scales, combine, flip and normalize.

    Returns:
      The features in float32, in the order of the images, with their names, and their labels if they have any.

    Raises:
      UserError: if the images, the layers or the choices cannot be used, or no image can be read.
    """
    unknown = choices.keys() - {field.name for field in dataclasses.fields(FeatureOptions)}
    if unknown:
        raise UserError(f"found the options {', '.join(sorted(unknown))}; expected those of FeatureOptions: omit them")
    options = FeatureOptions(layers, **choices)
    if isinstance(source, str | os.PathLike):
        images: ImageSource = open_source(os.fspath(source), preprocessing, split, data_dir)
    else:
        images = FileImages([str(name) for name, _ in find_images(source)], "", preprocessing)
    extraction = Extraction(model, variables, preprocessing, images, options, batch_size, not all_readable)
    store = MemoryRows()
    extraction.compute(store)
    features = Features(extraction.plan, store, options)
    found = {layer: features.block(layer, 0, len(features)) for layer in layers}
    labels = features.labels() if images.labeled else None
    description = _describe(model, variables, preprocessing, images, options)
    return Embeddings(found, features.names(), labels, description)


def _describe(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    source: ImageSource,
    options: FeatureOptions,
) -> dict[str, Any]:
    """Return the description of a file of features, without what only the result shows."""
    view = {name: value for name, value in dataclasses.asdict(options).items() if name != "layers"}
    network = {name: getattr(model, name) for name in MODEL_FIELDS}
    description = {
        "kind": KIND,
        "weights": weights_hash(model, variables, options.layers),
        "layers": options.layers,
        "view": view,
        "preprocessing": dataclasses.asdict(preprocessing),
        "images": source.fingerprint(),
        "network": {**network, "dtype": np.dtype(model.dtype).name},
        "class_names": source.class_names,
        "label_shape": source.label_shape,
    }
    return dict(json.loads(json.dumps(description)))


def _complete(path: str, description: Mapping[str, Any]) -> Extracted:
    """Return what a file holds; raise UserError if its features have other inputs."""
    found = read_description(path)
    changed = [name for name in INPUTS if found.get(name) != description[name]]
    if changed:
        raise UserError(
            f"{path} exists and has features of other {', '.join(changed)}; expected the same inputs, or no file: "
            "choose another output, or add --overwrite"
        )
    shutil.rmtree(path + PARTS, ignore_errors=True)  # of a process that was killed after it had written the file
    return Extracted(path, found["count"], found["unreadable"], False)
