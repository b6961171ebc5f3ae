"""Pretrained networks by name: fetched once, checked, and read from the cache ever after."""

import hashlib
import os
import urllib.error
import urllib.request
import uuid
from typing import Any

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.preprocess import AUTHORS, IMAGENET, Preprocessing
from vgg_jax.weight_files import load, load_with_preprocessing
from vgg_jax.weights import Variables

# torchvision's ImageNet weights, as timm keeps them on the Hugging Face hub.
HUB = {
    f"vgg{depth}{suffix}": f"timm/vgg{depth}{suffix}.tv_in1k" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")
}
# The paper authors' own, as Keras keeps them, with the MD5 sums that Keras states.
KERAS_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/{net}/{net}_weights_tf_dim_ordering_tf_kernels.h5"
)
AUTHORS_MD5 = {
    "vgg16_caffe": "64373286793e3c8b2b4e3219cbf3544b",
    "vgg19_caffe": "cbe5617147190e668d6c5d5026f83318",
}
NAMES = (*HUB, *AUTHORS_MD5)


def load_pretrained(name: str) -> tuple[VGG, Variables]:
    """Loads an ImageNet network; the first time, its file is downloaded and checked. No torch is needed.

    Args:
      name: vgg11, vgg13, vgg16, vgg19, each also with _bn: torchvision's weights, from timm's files on the Hugging Face
        hub, checked by the SHA-256 that the hub states. Or vgg16_caffe, vgg19_caffe: the paper authors' weights, from
        Keras' files, checked by the MD5 that Keras states; they want BGR images: see `preprocessing`.

    Raises:
      UserError: a ValueError, for another name; for a file that fails its check; and where the file is neither cached
        nor to be had, with what to download and where to put it.
    """
    if name not in NAMES:
        raise UserError(f"found no pretrained network {name!r}; expected one of {', '.join(NAMES)}")
    placed = os.path.join(cache_dir(), name + (".h5" if name in AUTHORS_MD5 else ".safetensors"))
    if name in AUTHORS_MD5:
        if os.path.exists(placed):
            _check(placed, "md5", AUTHORS_MD5[name])
        else:
            _download(KERAS_URL.format(net=name.removesuffix("_caffe")), placed, name, AUTHORS_MD5[name])
        return load(placed)
    return load(placed if os.path.exists(placed) else _from_hub(name, placed))


def load_weights(name_or_path: str) -> tuple[VGG, Variables, Preprocessing]:
    """A pretrained network by its name, or that of a file or a run, and what its weights want of an image."""
    if name_or_path in NAMES:
        return (*load_pretrained(name_or_path), preprocessing(name_or_path))
    return load_with_preprocessing(name_or_path)


def load_for_images(name_or_path: str) -> tuple[VGG, Variables, Preprocessing]:
    """`load_weights`, where the preprocessing must give the channels that the network takes."""
    model, variables, prepare = load_weights(name_or_path)
    channels = variables["params"]["conv1_1"]["kernel"].shape[2]
    if channels != len(prepare.mean):
        raise UserError(
            f"{name_or_path} takes images of {channels} channel(s), and does not say how to prepare them: expected a "
            "run's directory, or a .safetensors file that `vgg_jax.save` or `vgg_jax.convert` wrote"
        )
    return model, variables, prepare


def preprocessing(name_or_path: str | os.PathLike) -> Preprocessing:
    """What weights want of an image: a function from a PIL image to (H, W, C) float32, the network's input.

    Args:
      name_or_path: a name of `load_pretrained`, or a file or run's directory as for `load`.
    """
    if name_or_path in HUB:
        return IMAGENET
    if name_or_path in AUTHORS_MD5:
        return AUTHORS
    return load_with_preprocessing(name_or_path)[2]


def cache_dir() -> str:
    """Where files of weights are kept, or may be placed by hand: VGG_JAX_CACHE, or vgg_jax in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.environ.get("VGG_JAX_CACHE", os.path.join(base, "vgg_jax"))


def _from_hub(name: str, placed: str) -> str:
    """The path of a hub's file, in the hub's own cache, where each file's name is its SHA-256."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "huggingface_hub, which fetches weights, is not installed: pip install huggingface_hub"
        ) from None
    options: dict[str, Any] = dict(repo_id=HUB[name], filename="model.safetensors")
    try:
        path = huggingface_hub.hf_hub_download(**options, etag_timeout=5)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name} is not cached, and the hub cannot be reached ({reason}); download "
            f"{huggingface_hub.hf_hub_url(**options)} elsewhere and put it at {placed}"
        ) from None
    stated = os.path.basename(os.path.realpath(path))
    if len(stated) == 64:  # a SHA-256: the hub's large files are named by theirs
        _check(path, "sha256", stated)
    return path


def _download(url: str, path: str, name: str, md5: str) -> None:
    """Downloads a file; it appears whole and checked, or not at all."""
    from tqdm import tqdm

    partial = f"{path}.{uuid.uuid4().hex}.partial"  # of several processes, each its own
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(url, timeout=10) as response, open(partial, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=None) as progress:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    progress.update(len(chunk))
        _check(partial, "md5", md5)
        os.replace(partial, path)
    except UserError:
        os.remove(partial)
        raise
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{name} is not cached, and cannot be fetched ({error}); download {url} elsewhere and put it at {path}"
        ) from None


def _check(path: str, algorithm: str, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise UserError(f"{path} has {algorithm} {found}, expected {expected}: it is not used; fetch it again")
