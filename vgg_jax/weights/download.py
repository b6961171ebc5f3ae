"""Pretrained networks by name: downloaded once, checked, and read from the cache afterwards."""

import contextlib
import glob
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import uuid
from typing import Any

from vgg_jax.console import Bar
from vgg_jax.data.preprocessing import AUTHORS, IMAGENET, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.weights.formats import Announce, Loaded, load_file, save_file, without_head
from vgg_jax.weights.imagenet_classes import imagenet_classes

# torchvision's ImageNet weights, in timm's repositories on the Hugging Face hub.
HUB = {
    f"vgg{depth}{suffix}": f"timm/vgg{depth}{suffix}.tv_in1k" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")
}
# The weights of the paper's authors, from Keras' server, with the MD5 sums that Keras publishes.
KERAS_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/{net}/{net}_weights_tf_dim_ordering_tf_kernels.h5"
)
AUTHORS_MD5 = {
    "vgg16_caffe": "64373286793e3c8b2b4e3219cbf3544b",
    "vgg19_caffe": "cbe5617147190e668d6c5d5026f83318",
}
NAMES = (*HUB, *AUTHORS_MD5)
SHA256_LENGTH = 64  # hexadecimal digits


def load_pretrained(name: str, announce: Announce | None = None) -> Loaded:
    """Load an ImageNet network; the first time, download its file and check it. Needs no torch.

    Args:
      name: vgg11, vgg13, vgg16 or vgg19, each also with _bn, for torchvision's weights, from timm's repositories on
        the Hugging Face hub, checked by the SHA-256 that the hub publishes; or vgg16_caffe or vgg19_caffe for the
        weights of the paper's authors, from Keras' files, checked by the MD5 that Keras publishes.
      announce: as for `formats.load_file`.

    Returns:
      The network with its preprocessing and the names of its classes.

    Raises:
      UserError: if the name is unknown, the file fails its check, or it is neither cached nor reachable; the message
        then says what to download and where to put it.
    """
    if name not in NAMES:
        raise UserError(f"found no pretrained network {name!r}; expected one of {', '.join(NAMES)}")
    placed = _placed_file(name)
    if name in AUTHORS_MD5:
        if os.path.exists(placed):
            _check(placed, "md5", AUTHORS_MD5[name])
        else:
            _download(KERAS_URL.format(net=name.removesuffix("_caffe")), placed, name, AUTHORS_MD5[name])
        return _of_imagenet(load_file(placed), AUTHORS)
    path = placed if os.path.exists(placed) else _from_hub(name, placed)

    def completed(loaded: Loaded) -> Loaded:
        # timm's repositories hold torchvision's networks under timm's names.
        return _of_imagenet(loaded._replace(model=loaded.model.clone(conv_head=False)), IMAGENET)

    return completed(load_file(path, announce=announce and (lambda loaded: announce(completed(loaded)))))


def _of_imagenet(loaded: Loaded, preprocessing: Preprocessing) -> Loaded:
    """Return the network with the preprocessing of its training and ImageNet's class names."""
    classes = imagenet_classes() if loaded.model.num_classes == 1000 else loaded.classes
    return loaded._replace(preprocessing=preprocessing, classes=classes, outputs="softmax", notes=())


def load_weights(name_or_path: str, features_only: bool = False, announce: Announce | None = None) -> Loaded:
    """Load a pretrained network if `name_or_path` is in NAMES, else the network of a file; see `load_file`."""
    if name_or_path in NAMES:
        return load_features(name_or_path, announce) if features_only else load_pretrained(name_or_path, announce)
    return load_file(name_or_path, features_only, announce)


def load_features(name: str, announce: Announce | None = None) -> Loaded:
    """Load the convolutional part of a pretrained network.

    The first time, load the whole network and write its convolutional part to the cache, under the SHA-256 of the file.
    Later calls check and read only this file: 59 MB of VGG-16 instead of 553. A whole file that was put into the cache
    afterwards comes first.

    Args:
      name: as for `load_pretrained`.
      announce: as for `formats.load_file`.

    Returns:
      The network without a head, with its preprocessing.

    Raises:
      UserError: as `load_pretrained`. If the cache cannot be written, the result has a note instead.
    """
    if cut := _cut_file(name):
        _check(cut, "sha256", cut.removesuffix(".safetensors")[-SHA256_LENGTH:])
        return load_file(cut, announce=announce)
    loaded = without_head(load_pretrained(name, announce and (lambda loaded: announce(without_head(loaded)))))
    partial = os.path.join(cache_dir(), f"{name}_features-{uuid.uuid4().hex}.safetensors")
    try:
        os.makedirs(cache_dir(), exist_ok=True)
        save_file(partial, loaded)
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(partial, os.path.join(cache_dir(), f"{name}_features-{digest}.safetensors"))
    except (UserError, OSError) as error:
        return loaded._replace(notes=(*loaded.notes, f"the convolutional part is not cached for later calls: {error}"))
    return loaded


def _cut_file(name: str) -> str | None:
    """Return the path of the cached convolutional part, or None if a newer whole file is in the cache."""
    found = glob.glob(os.path.join(glob.escape(cache_dir()), f"{name}_features-{'?' * SHA256_LENGTH}.safetensors"))
    newest = max(found, key=os.path.getmtime, default=None)
    placed = _placed_file(name)
    if newest and os.path.exists(placed) and os.path.getmtime(placed) > os.path.getmtime(newest):
        return None
    return newest


def _placed_file(name: str) -> str:
    """Return where the cache has the whole file of a pretrained network."""
    return os.path.join(cache_dir(), name + (".h5" if name in AUTHORS_MD5 else ".safetensors"))


def cache_dir() -> str:
    """Return the folder of downloaded files: VGG_JAX_CACHE, or vgg_jax in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.environ.get("VGG_JAX_CACHE", os.path.join(base, "vgg_jax"))


def _from_hub(name: str, placed: str) -> str:
    """Return the path of a file in the hub's own cache, which names each file by its SHA-256."""
    import huggingface_hub  # here, because a network from a file does not need it

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
    if len(stated) == SHA256_LENGTH:  # only large files are named by theirs
        _check(path, "sha256", stated)
    return str(path)


def _download(url: str, path: str, name: str, md5: str) -> None:
    """Download a file. It appears complete and checked, or not at all."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"  # one for each process that downloads at the same time
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(url, timeout=10) as response, open(partial, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with Bar(f"downloading {name}", size / 1e6, "MB") as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk) / 1e6)
        _check(partial, "md5", md5)
        os.replace(partial, path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise UserError(
            f"{name} is not cached, and cannot be downloaded ({error}); download {url} elsewhere and put it at {path}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)  # it has its final name if all went well


def _check(path: str, algorithm: str, expected: str) -> None:
    """Raise UserError if the checksum of the file is not the expected one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise UserError(f"{path} has {algorithm} {found}, expected {expected}: delete the file and download it again")
