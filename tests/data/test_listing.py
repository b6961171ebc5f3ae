"""Which files of a folder are images, and how the others are counted and named."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.cli.test_train import ROOT
from tests.conftest import raises_user_error
from tests.data.archives import encoded
from vgg_jax.data import listing
from vgg_jax.data.listing import find_images

PNG = encoded(PIL.Image.new("RGB", (8, 6), (200, 10, 30)), "PNG")

PILLOW_HEIF = b"""
import PIL.Image

def register_heif_opener():
    PIL.Image.register_open("HEIF", print)
    PIL.Image.register_extension("HEIF", ".heic")
"""


def write(path, data=PNG):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_suffixes_are_torchvisions_and_pillows(torchvision):
    assert set(torchvision.datasets.folder.IMG_EXTENSIONS) <= listing.suffixes()
    assert {".jfif", ".jpe", ".gif", ".avif", ".jp2", ".tga", ".apng"} <= listing.suffixes()
    assert not {".txt", ".h5", ".mpg", ".eps", ".pdf", ".json"} & listing.suffixes()


def test_predict_finds_images_of_all_suffixes_and_subfolders(tmp_path, capsys):
    names = ["A.JPG", "b.jfif", "c.jpe", "cat/0.avif", "cat/kittens/1.tif", "dog/2.jp2", "e.gif", "f.bmp", "g.webp"]
    for name in names:
        write(tmp_path / name)
    assert find_images(tmp_path) == [(str(tmp_path / name),) * 2 for name in names]
    assert capsys.readouterr().err == ""


def test_skipped_files_are_counted_and_named(tmp_path, capsys):
    for name in ("0.png", "notes.txt", "more.TXT", "README", "._0.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        write(tmp_path / "photos" / name)
    for name in ("__MACOSX/._0.png", ".ipynb_checkpoints/0-checkpoint.png", "1.heic"):
        write(tmp_path / "photos" / name)
    (tmp_path / "photos" / "2.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "photos" / "3.png")
    assert find_images(tmp_path / "photos") == [(str(tmp_path / "photos" / "0.png"),) * 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}/photos: skipped 12 files: ")
    for part in (
        "1 .heic (photos/1.heic)",
        "2 .txt (photos/more.TXT, ...)",
        "1 dangling link (photos/2.png)",
        "1 special file (photos/3.png)",
        "1 file without a suffix (photos/README)",
        "6 hidden or system files (photos/.DS_Store, ...)",
        "install pillow-heif to read HEIC",
    ):
        assert part in line


def test_folder_of_other_files_names_them(tmp_path):
    write(tmp_path / "1.heic")
    with raises_user_error("is a folder without images", "skipped 1 file: 1 .heic", "install pillow-heif"):
        find_images(tmp_path)


def test_links_are_followed_but_not_in_a_loop(tmp_path):
    """A link to a folder above would list the images of other classes."""
    write(tmp_path / "cat" / "0.png")
    write(tmp_path / "dog" / "1.png")
    write(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dog" / "up").symlink_to(tmp_path)
    (tmp_path / "dog" / "self").symlink_to(tmp_path / "dog")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "dog")
    skipped = listing.Skipped()
    found = listing.list_images(str(tmp_path / "dog"), skipped)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["dog/1.png", "dog/more/2.png"]
    assert "3 links to a folder above" in str(skipped)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder_is_named(tmp_path):
    write(tmp_path / "closed" / "0.png")
    (tmp_path / "closed").chmod(0)
    with raises_user_error(f"{tmp_path}/closed cannot be read: Permission denied"):
        find_images(tmp_path)


def test_images_in_memory_keep_their_places(tmp_path):
    write(tmp_path / "0.png")
    array = np.zeros((4, 4, 3), np.uint8)
    found = find_images([array, str(tmp_path), PIL.Image.new("L", (3, 3))])
    assert [name for name, _ in found] == ["image 0", str(tmp_path / "0.png"), "image 2"]
    assert [name for name, _ in find_images(np.stack([array] * 2))] == ["image 0", "image 1"]


def test_heic_is_read_if_pillow_heif_is_installed(tmp_path):
    """The package is replaced by one that registers the suffix, as pillow-heif does."""
    write(tmp_path / "pillow_heif.py", PILLOW_HEIF)
    code = "from vgg_jax.data.listing import suffixes; print('.heic' in suffixes())"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert process.stdout == "True\n", process.stderr
