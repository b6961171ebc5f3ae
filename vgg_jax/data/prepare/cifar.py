"""CIFAR-10 and CIFAR-100 from the authors' archives, as TFDS's `cifar10` and `cifar100` 3.0.2, without TensorFlow.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import glob
import http.client
import io
import os
import re
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.console import log
from vgg_jax.data.prepare.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError, first_line, require


@dataclass(frozen=True)
class Archive:
    """The address and the contents of an archive."""

    url: str
    files: Mapping[str, tuple[str, ...]]  # the files of each split
    labels: Mapping[str, str]  # from each label, in the order of a record, to the file of its class names


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        {"label": "batches.meta.txt"},
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        {"train": ("train.bin",), "test": ("test.bin",)},
        {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    ),
}
PIXELS = (3, 32, 32)  # shape of a record's image, which follows the labels of one byte each
PROBE_SECONDS = 10


def prepare(
    name: str, data_dir: str, manual_dir: str | None = None, url_infos: Mapping[str, Any] | None = None
) -> None:
    """Write `data_dir`/`name`/3.0.2 in array_record format, unless it exists.

    TFDS's download manager downloads the archive, or takes it from `manual_dir`, and checks its SHA-256.

    Args:
      name: cifar10 or cifar100.
      data_dir: TFDS's data directory; downloads go to `data_dir`/downloads.
      manual_dir: directory in which the user may place the archive; by default `data_dir`/downloads/manual.
      url_infos: TFDS's `UrlInfo` (size, SHA-256, file name) by address; by default those of TFDS.

    Raises:
      UserError: if the archive can be neither found nor downloaded, if it is not the authors', or if `data_dir` cannot
        be written.
    """
    tfds = require("tensorflow_datasets", "train")
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    archive = ARCHIVES[name]

    def contents() -> tuple[Any, list[Shard]]:
        path = _download(name, archive.url, os.path.join(data_dir, "downloads"), manual_dir, url_infos)
        files = _members(path)
        for label, file in archive.labels.items():
            builder.info.features[label].names = [line for line in files[file].decode().split("\n") if line]

        def shard(split: str, i: int) -> Shard:
            names = archive.files[split]
            first = sum(_count(files[file], archive) for file in names[:i])
            return Shard(split, lambda: serialize(builder.info, _examples(files[names[i]], archive, split, first)))

        return builder.info, [shard(split, i) for split, names in archive.files.items() for i in range(len(names))]

    write_once(str(builder.data_dir), contents)


def _members(path: str) -> dict[str, bytes]:
    """Return the contents of an archive's files by base name."""
    with tarfile.open(path) as tar:
        opened = {os.path.basename(member.name): tar.extractfile(member) for member in tar if member.isfile()}
        return {name: file.read() for name, file in opened.items() if file is not None}


def _count(data: bytes, archive: Archive) -> int:
    return len(data) // (len(archive.labels) + int(np.prod(PIXELS)))


def _examples(data: bytes, archive: Archive, split: str, first: int) -> Iterator[dict[str, Any]]:
    """Yield the examples of a file as TFDS has them; the first one has the number `first` in its split."""
    num_labels = len(archive.labels)
    records = np.frombuffer(data, np.uint8).reshape(_count(data, archive), -1)
    for i, record in enumerate(records, first):
        image = PIL.Image.fromarray(record[num_labels:].reshape(PIXELS).transpose(1, 2, 0))
        png = io.BytesIO()
        image.save(png, "PNG")
        png.seek(0)
        labels = dict(zip(archive.labels, map(int, record[:num_labels]), strict=True))
        yield {"image": png, "id": f"{split}_{i:05d}", **labels}


def _download(
    name: str, url: str, download_dir: str, manual_dir: str | None, url_infos: Mapping[str, Any] | None
) -> str:
    """Return the path of the archive of `url`, placed by the user or downloaded, after checking its SHA-256."""
    tfds = require("tensorflow_datasets", "train")
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    manual_dir = manual_dir or os.path.join(download_dir, "manual")
    file_name = os.path.basename(url)
    placed = os.path.join(manual_dir, file_name)
    pattern = os.path.join(glob.escape(download_dir), "**", f"*{file_name.partition('.')[0]}*.gz")
    complete = [path for path in glob.glob(pattern, recursive=True) if ".tmp." not in path]
    if not os.path.exists(placed) and not complete:
        try:
            _probe(url)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{name} is not in {os.path.dirname(download_dir)}, and its archive {url} cannot be downloaded: "
                f"{first_line(error)}; set --config.data.data_dir (or TFDS_DATA_DIR) to the directory that has "
                f"{name}, or place the archive as {placed} and rerun the same command"
            ) from None
        log(f"downloading {url}")
    manager = tfds.download.DownloadManager(
        download_dir=download_dir,
        manual_dir=manual_dir,
        url_infos=dict(url_infos or {}),
        dataset_name=name,
        force_checksums_validation=True,
    )
    try:
        return str(manager.download(url))
    except (DownloadError, OSError) as error:
        raise UserError(f"downloading {url} failed: {first_line(error)}; rerun the same command") from None
    except NonMatchingChecksumError as error:
        message = str(error)
        expected, found = re.findall(r"checksum='(\w+)'", message)
        path = message.partition("downloaded to ")[2].partition(", has wrong")[0]
        raise UserError(
            f"{path} is not the archive of {url}: found SHA-256 {found}, expected {expected}; delete the file and "
            "rerun the same command"
        ) from None


def _probe(url: str) -> None:
    """Ask for the headers of `url`: without a network, TFDS itself tries for 204 s before it fails.

    Raises:
      OSError or HTTPException: if the server cannot be reached, or refuses.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):  # TFDS has root certificates of its own
            raise
