"""ImageNet from its two archives."""

import io
import tarfile

import numpy as np
import PIL.Image

from tests.conftest import raises_user_error
from tests.data.archives import add, manual_dir, records, write_imagenet_archives
from vgg_jax.data.prepare import imagenet


def test_imagenet_has_the_labels_of_tfds_and_only_jpegs(imagenet_dir, synsets):
    import tensorflow_datasets as tfds

    assert len(synsets) == 1000
    read = records(imagenet_dir, "imagenet2012", "train")
    assert len(read) == 1002
    assert {record["label"] for record in read} == set(range(1000))
    for record in read:
        name = record["file_name"].decode()
        assert name.startswith(synsets[record["label"]])
        image = PIL.Image.open(io.BytesIO(record["image"]))
        assert (image.format, image.mode) == ("JPEG", "RGB"), name
    by_name = {record["file_name"].decode().partition("_")[2]: record["image"] for record in read[:4]}
    for repaired, original in (("cmyk.JPEG", "0.JPEG"), ("png.JPEG", "1.JPEG")):
        a, b = (np.asarray(PIL.Image.open(io.BytesIO(by_name[name])), int) for name in (repaired, original))
        assert abs(a - b).mean() < 12  # levels: the same photograph, compressed otherwise; its negative is at 100

    with open(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")) as file:
        labels = file.read().split()
    validation = records(imagenet_dir, "imagenet2012", "validation")
    assert [record["file_name"].decode() for record in validation] == [
        f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 21)
    ]
    assert [synsets[record["label"]] for record in validation] == labels[:20]


def test_stopped_preparation_resumes_with_the_finished_shards(tmp_path, synsets):
    directory = manual_dir(tmp_path)
    write_imagenet_archives(directory, synsets, size=16)
    whole = (directory / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "r:") as tar:
        member = tar.getmember(f"{synsets[500]}.tar")
    damaged = bytearray(whole)
    damaged[member.offset_data + 512 : member.offset_data + 1024] = bytes(512)  # the image of class 500
    (directory / "ILSVRC2012_img_train.tar").write_bytes(damaged)
    with raises_user_error(f"{synsets[500]}_500.JPEG is not an image", "download the archive again"):
        imagenet.prepare(str(tmp_path))
    staging = tmp_path / "imagenet2012" / ".5.1.0.preparing"
    kept = {path: path.stat().st_ino for path in staging.glob("*-of-00100")}
    assert len(kept) == 50  # of ten classes each
    (directory / "ILSVRC2012_img_train.tar").write_bytes(whole)
    imagenet.prepare(str(tmp_path))
    target = tmp_path / "imagenet2012" / "5.1.0"
    assert {path: (target / path.name).stat().st_ino for path in kept} == kept  # the same files
    assert len(records(tmp_path, "imagenet2012", "train")) == 1002
    assert not staging.exists()


def test_archives_of_other_contents_are_refused(tmp_path, synsets):
    with raises_user_error("ILSVRC2012_img_train.tar and ", "ILSVRC2012_img_val.tar is missing", "--manual-dir"):
        imagenet.prepare(str(tmp_path))
    directory = manual_dir(tmp_path)
    write_imagenet_archives(directory, [*synsets[:998], "n00000000"], size=16)
    with raises_user_error("has 999 members", f"missing {synsets[998]}, {synsets[999]}", "unknown n00000000"):
        imagenet.prepare(str(tmp_path))
    train_tar = directory / "ILSVRC2012_img_train.tar"
    whole = train_tar.read_bytes()
    with tarfile.open(train_tar) as tar:
        last = tar.getmembers()[-1]
    headless = whole[: last.offset] + b"x" * 512 + whole[last.offset + 512 :]  # tarfile takes it for the end
    for damaged in (whole[: last.offset + 100], whole[: last.offset], headless):
        train_tar.write_bytes(damaged)
        with raises_user_error(f"{train_tar} is"):
            imagenet.prepare(str(tmp_path))
    assert not (tmp_path / "imagenet2012" / "5.1.0").exists()


def test_member_outside_and_link_do_no_harm(tmp_path):
    """Archives are read, never unpacked: the name of a member does not matter."""
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../evil.JPEG", b"x")
        link = tarfile.TarInfo("link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [member.name for member in imagenet._members(str(path))] == ["../../evil.JPEG"]
