"""CIFAR-10 and CIFAR-100 from the authors' archives, as TFDS's `cifar10` and `cifar100` 3.0.2, without TensorFlow.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.data.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError, first_line
from vgg_jax.reporting import say


@dataclass(frozen=True)
class Archive:
    """Where an archive is, and what is in it."""

    url: str
    files: Mapping[str, tuple[str, ...]]  # from a split to its files
    labels: Mapping[str, str]  # from the name of a label to the file of its classes' names, as each record has them


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
PIXELS = (3, 32, 32)  # of a record, after its labels of a byte each


def prepare(
    name: str, data_dir: str, manual_dir: str | None = None, url_infos: Mapping[str, Any] | None = None
) -> None:
    """Writes `data_dir`/`name`/3.0.2 once, in array_record format; does nothing where it is.

    TFDS's download manager fetches the archive, or takes it from `manual_dir`, and checks its SHA-256.

    Args:
      name: cifar10 or cifar100.
      data_dir: TFDS's data directory; downloads go to `data_dir`/downloads.
      manual_dir: where a user may have placed the archive; by default `data_dir`/downloads/manual.
      url_infos: TFDS's `UrlInfo` (size, SHA-256, file name) by address, instead of those that TFDS knows.

    Raises:
      UserError: where the archive can be neither found nor fetched, or is not the authors', or `data_dir` cannot be
        written.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    archive = ARCHIVES[name]

    def contents() -> tuple[Any, list[Shard]]:
        path = _fetch(name, archive.url, os.path.join(data_dir, "downloads"), manual_dir, url_infos)
        with tarfile.open(path) as tar:
            files = {os.path.basename(member.name): tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        for label, file in archive.labels.items():
            builder.info.features[label].names = [line for line in files[file].decode().split("\n") if line]

        def shard(split: str, i: int) -> Shard:
            names = archive.files[split]
            first = sum(_count(files[file], archive) for file in names[:i])
            return Shard(split, lambda: serialize(builder.info, _examples(files[names[i]], archive, split, first)))

        return builder.info, [shard(split, i) for split, names in archive.files.items() for i in range(len(names))]

    write_once(str(builder.data_dir), contents)


def _count(data: bytes, archive: Archive) -> int:
    return len(data) // (len(archive.labels) + int(np.prod(PIXELS)))


def _examples(data: bytes, archive: Archive, split: str, first: int) -> Iterator[dict[str, Any]]:
    num_labels = len(archive.labels)
    records = np.frombuffer(data, np.uint8).reshape(_count(data, archive), -1)
    for i, record in enumerate(records, first):
        image = PIL.Image.fromarray(record[num_labels:].reshape(PIXELS).transpose(1, 2, 0))
        png = io.BytesIO()
        image.save(png, "PNG")
        png.seek(0)
        labels = dict(zip(archive.labels, map(int, record[:num_labels]), strict=True))
        yield {"image": png, "id": f"{split}_{i:05d}", **labels}


def _fetch(name: str, url: str, download_dir: str, manual_dir: str | None, url_infos: Mapping[str, Any] | None) -> str:
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    manual_dir = manual_dir or os.path.join(download_dir, "manual")
    file_name = os.path.basename(url)
    placed = os.path.join(manual_dir, file_name)
    fetched = os.path.join(glob.escape(download_dir), "**", f"*{file_name.partition('.')[0]}*.gz")
    whole = [path for path in glob.glob(fetched, recursive=True) if ".tmp." not in path]
    if not os.path.exists(placed) and not whole:
        try:  # TFDS itself tries for minutes
            requests.head(url, timeout=10, allow_redirects=True).raise_for_status()
        except requests.RequestException as error:
            raise UserError(
                f"{name} is not in {os.path.dirname(download_dir)} (set --config.data.data_dir or TFDS_DATA_DIR to "
                f"where it is), and its archive cannot be fetched: {url}: {first_line(error)}; place the archive "
                f"as {placed}, and give the same command again"
            ) from None
        say(f"fetching {url}")
    manager = tfds.download.DownloadManager(
        download_dir=download_dir,
        manual_dir=manual_dir,
        url_infos=dict(url_infos or {}),
        dataset_name=name,
        force_checksums_validation=True,
    )
    try:
        return os.fspath(manager.download(url))
    except (requests.RequestException, DownloadError, OSError) as error:
        raise UserError(f"fetching {url} failed: {first_line(error)}; give the same command again") from None
    except NonMatchingChecksumError as error:
        message = str(error)
        expected, found = re.findall(r"checksum='(\w+)'", message)
        path = message.partition("downloaded to ")[2].partition(", has wrong")[0]
        raise UserError(
            f"{path} is not the archive of {url}: expected SHA-256 {expected}, found {found}; delete it, and give the "
            "same command again"
        ) from None
