"""CIFAR-10 from the authors' archive, placed by the user or downloaded."""

import functools
import hashlib
import http.server
import io
import ssl
import tarfile
import threading
import urllib.error
import urllib.request

import numpy as np
import PIL.Image

from tests.conftest import raises_user_error
from tests.data.archives import CIFAR10_CLASSES, manual_dir, records, write_cifar10_archive
from vgg_jax.data.prepare import cifar


def test_cifar10_is_prepared_as_tfds_has_it(tmp_path):
    """tests/cli/test_train.py trains on it."""
    archive = manual_dir(tmp_path) / "cifar-10-binary.tar.gz"
    cifar.prepare("cifar10", str(tmp_path), url_infos=write_cifar10_archive(archive))
    with tarfile.open(archive) as tar:
        originals = {
            split: np.frombuffer(
                b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names), np.uint8
            ).reshape(-1, 3073)
            for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"]))
        }
    for split, rows in originals.items():
        read = records(tmp_path, "cifar10", split)
        assert len(read) == len(rows)
        for i, (record, row) in enumerate(zip(read, rows, strict=True)):
            image = PIL.Image.open(io.BytesIO(record["image"]))
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), row[1:])
            assert (record["label"], record["id"].decode()) == (row[0], f"{split}_{i:05d}")

    import tensorflow_datasets as tfds

    info = tfds.builder("cifar10", data_dir=str(tmp_path)).info
    assert info.features["label"].names == CIFAR10_CLASSES
    assert (str(info.version), info.file_format.value) == ("3.0.2", "array_record")


def test_archive_with_a_wrong_byte_names_both_checksums(tmp_path):
    archive = manual_dir(tmp_path) / "cifar-10-binary.tar.gz"
    infos = write_cifar10_archive(archive)
    (info,) = infos.values()
    data = bytearray(archive.read_bytes())
    data[1000] ^= 1
    archive.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    official = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    with raises_user_error(f"found SHA-256 {found}, expected {info.checksum}", str(archive), "delete the file"):
        cifar.prepare("cifar10", str(tmp_path), url_infos=infos)
    with raises_user_error(f"found SHA-256 {found}, expected {official}"):
        cifar.prepare("cifar10", str(tmp_path))
    assert not (tmp_path / "cifar10" / "3.0.2").exists()


def use_server(directory, monkeypatch, action):
    """Call `action` with the archive's URL while a server on this machine has the files of a directory."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        archive = cifar.Archive(url, cifar.ARCHIVES["cifar10"].files, cifar.ARCHIVES["cifar10"].labels)
        monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
        try:
            action(url)
        finally:
            server.shutdown()


def test_archive_is_downloaded(tmp_path, monkeypatch):
    """The server is on this machine, because tests have no network."""
    (tmp_path / "server").mkdir()
    ((_, info),) = write_cifar10_archive(tmp_path / "server" / "cifar-10-binary.tar.gz", per_file=10).items()

    def prepare(url):
        cifar.prepare("cifar10", str(tmp_path / "tfds"), url_infos={url: info})

    use_server(tmp_path / "server", monkeypatch, prepare)
    assert len(records(tmp_path / "tfds", "cifar10", "train")) == 50


def test_server_without_the_archive_is_named(tmp_path, monkeypatch):
    def prepare(url):
        with raises_user_error(f"its archive {url} cannot be downloaded: HTTP Error 404", "place the archive as"):
            cifar.prepare("cifar10", str(tmp_path))

    use_server(tmp_path, monkeypatch, prepare)


def test_unknown_certificate_is_left_to_tfds(monkeypatch):
    """TFDS downloads by requests, which has root certificates of its own."""

    def fail(*arguments, **options):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("certificate verify failed"))

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    cifar._probe("https://example.org")


def test_without_archive_and_network_the_remedy_is_named(tmp_path):
    placed = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    with raises_user_error("cifar10 is not in", str(tmp_path), f"place the archive as {placed}", "same command"):
        cifar.prepare("cifar10", str(tmp_path))
