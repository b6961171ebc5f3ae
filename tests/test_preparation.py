"""From the authors' archives to TFDS data sets on disk, without TensorFlow, whatever happens meanwhile."""

import functools
import hashlib
import http.server
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest

from tests.archives import CIFAR10_CLASSES, add, encoded, write_cifar10_archive, write_imagenet_archives
from tests.conftest import raises_user_error, write_cifar10
from tests.test_train_command import NARROW, ROOT, SMALL_IMAGES, train
from tests.test_train_command import command as train_command
from vgg_jax import prepare
from vgg_jax.config import DataConfig
from vgg_jax.data import cifar, digits, imagenet, tfrecord
from vgg_jax.data.sources import open_split


@pytest.fixture(autouse=True)
def no_tensorflow():
    yield
    assert "tensorflow" not in sys.modules  # nothing here has imported it


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nobody answers


@pytest.fixture(autouse=True)
def own_checksums(monkeypatch):
    """TFDS keeps the checksums that one test has given for the next."""
    from tensorflow_datasets.core.download import checksums

    monkeypatch.setattr(checksums, "get_all_url_infos", checksums.get_all_url_infos.__wrapped__)


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()


def manual_dir(data_dir):
    path = data_dir / "downloads" / "manual"
    path.mkdir(parents=True, exist_ok=True)
    return path


def records(data_dir, name, split):
    source = open_split(DataConfig(name, str(data_dir)), split).records
    return [source[i] for i in range(len(source))]


# --- CIFAR-10


def test_cifar10_is_prepared_as_tfds_has_it(tmp_path):
    """It is trained on in test_train_command.py."""
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


def test_an_archive_with_a_wrong_byte_is_refused_with_both_checksums(tmp_path):
    archive = manual_dir(tmp_path) / "cifar-10-binary.tar.gz"
    infos = write_cifar10_archive(archive)
    (info,) = infos.values()
    data = bytearray(archive.read_bytes())
    data[1000] ^= 1
    archive.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    official = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    with raises_user_error(f"expected SHA-256 {info.checksum}, found {found}", str(archive), "delete it"):
        cifar.prepare("cifar10", str(tmp_path), url_infos=infos)
    with raises_user_error(f"expected SHA-256 {official}, found {found}"):
        cifar.prepare("cifar10", str(tmp_path))
    assert not (tmp_path / "cifar10" / "3.0.2").exists()


def test_an_archive_is_fetched(tmp_path, monkeypatch):
    """From a server here, for there is no network in tests."""
    (tmp_path / "server").mkdir()
    ((_, info),) = write_cifar10_archive(tmp_path / "server" / "cifar-10-binary.tar.gz", per_file=10).items()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        archive = cifar.Archive(url, cifar.ARCHIVES["cifar10"].files, cifar.ARCHIVES["cifar10"].labels)
        monkeypatch.setitem(cifar.ARCHIVES, "cifar10", archive)
        cifar.prepare("cifar10", str(tmp_path / "tfds"), url_infos={url: info})
        server.shutdown()
    assert len(records(tmp_path / "tfds", "cifar10", "train")) == 50


def test_without_archive_and_network_it_says_what_to_place_where(tmp_path):
    placed = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    with raises_user_error("cifar10 is not in", str(tmp_path), f"place the archive as {placed}", "same command"):
        cifar.prepare("cifar10", str(tmp_path))


KILLS = 10
KILLED = """
import os, random, signal, sys, time
import tensorflow_datasets as tfds
from vgg_jax.data import cifar
from tests.archives import write_cifar10_archive
tfds.disable_progress_bar()
data_dir, archive, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
infos = write_cifar10_archive(archive, per_file=200)

def start(data_dir):
    pid = os.fork()
    if pid == 0:
        try:
            cifar.prepare("cifar10", data_dir, os.path.dirname(archive), infos)
            os._exit(0)
        finally:
            os._exit(1)
    return pid

begin = time.monotonic()
assert os.waitpid(start(data_dir + "/whole"), 0)[1] == 0
duration = time.monotonic() - begin
random.seed(0)
killed = 0
for i in range(kills):
    pid = start(data_dir + "/killed")
    time.sleep(random.uniform(0, duration))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if os.path.isdir(data_dir + "/killed/cifar10/3.0.2"):  # it was faster than the signal: from the start again
        os.rename(data_dir + "/killed", f"{data_dir}/done{i}")
pids = [start(data_dir + "/killed"), start(data_dir + "/killed")]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
print(killed)
"""


def test_after_kill_9_the_same_command_succeeds_and_two_at_once_write_one_copy(tmp_path):
    """Ten processes are killed at random moments of a preparation; then two go on at the same time."""
    arguments = [str(tmp_path), str(tmp_path / "cifar-10-binary.tar.gz"), str(KILLS)]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env={**os.environ}, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.splitlines()[-1]) >= 2  # the others had ended before
    copies = ["whole", "killed", *(path.name for path in tmp_path.glob("done*"))]
    for copy in copies:
        assert os.listdir(tmp_path / copy / "cifar10") in (["3.0.2", ".3.0.2.lock"], [".3.0.2.lock", "3.0.2"])
        for split in ("train", "test"):
            assert_same_records(
                records(tmp_path / copy, "cifar10", split), records(tmp_path / "whole", "cifar10", split)
            )


def assert_same_records(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a == b


# --- ImageNet


@pytest.fixture(scope="module")
def synsets():
    import tensorflow_datasets as tfds

    return tfds.builder("imagenet2012", data_dir="/nonexistent").info.features["label"].names


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory, synsets):
    """A data directory with ImageNet prepared from stand-in archives."""
    path = tmp_path_factory.mktemp("imagenet")
    write_imagenet_archives(manual_dir(path), synsets)
    imagenet.prepare(str(path))
    return path


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
        assert abs(a - b).mean() < 12  # levels: the same small photograph, compressed otherwise; its negative is at 100

    with open(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")) as file:
        labels = file.read().split()
    validation = records(imagenet_dir, "imagenet2012", "validation")
    assert [record["file_name"].decode() for record in validation] == [
        f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 21)
    ]
    assert [synsets[record["label"]] for record in validation] == labels[:20]


def test_an_epoch_of_imagenet_with_ctrl_c_in_it(imagenet_dir, tmp_path):
    """The first time it is interrupted between steps: no traceback, no process is left; the second time it ends."""
    fields = (
        *SMALL_IMAGES[3:],
        *("data.dataset=imagenet2012", "data.eval_split=validation", "model.num_classes=1000", "model.depth=11"),
        *("data.train_view=scale_crop", "data.train_scale=(20, 40)", "data.image_size=16", "data.resize=20"),
        *("data.color_shift=0.1", "batch_size=100", "eval_batch_size=20", "num_epochs=1", "optimizer.warmup_epochs=0"),
        "log_every_steps=1",
    )
    arguments = ("vgg16.py", tmp_path / "run", imagenet_dir, *fields)
    returncode, stderr = interrupt(arguments, after="step 2/10")
    assert (returncode, stderr) == (130, "")
    output = train(*arguments, script=NARROW)
    assert "going on from the checkpoint of step" in output
    assert "1,002 training and 20 evaluation images; 10 steps" in output
    assert "finished: step 10" in output
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["count"] for line in metrics.splitlines() if '"eval"' in line] == [20]


def test_ctrl_c_before_the_first_step(data_dir, tmp_path):
    """There is nothing to save: it ends at once, by the signal, which a shell gives as 130 too."""
    returncode, stderr = interrupt(("digits.py", tmp_path / "run", data_dir), after="evaluation images")
    assert (returncode, stderr) == (-signal.SIGINT, "")


def interrupt(arguments, after):
    """Starts train.py, sends SIGINT when it prints `after`, and returns its exit code and what it said of errors."""
    process = subprocess.Popen(
        train_command(*arguments, script=NARROW),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True),
    )
    while after not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):  # of its group, nobody is left
        os.killpg(process.pid, 0)
    return process.returncode, stderr


def test_a_stopped_preparation_goes_on_where_it_was(tmp_path, synsets, monkeypatch):
    directory = manual_dir(tmp_path)
    write_imagenet_archives(directory, synsets, size=16)
    whole = (directory / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "r:") as tar:
        member = tar.getmember(f"{synsets[500]}.tar")
    damaged = bytearray(whole)
    damaged[member.offset_data + 512 : member.offset_data + 1024] = bytes(512)  # the image of class 500
    (directory / "ILSVRC2012_img_train.tar").write_bytes(damaged)
    with raises_user_error(f"{synsets[500]}_500.JPEG is not an image", "fetch the archive again"):
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


def test_archives_that_are_not_imagenets_are_refused(tmp_path, synsets):
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


# --- other data sets, and the command


def command(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    code = prepare.main()
    return code, capsys.readouterr()


def test_tfrecord_data_are_rewritten_record_by_record(tmp_path, monkeypatch, capsys):
    """The TFRecord files are written here by hand, after the format's description: TensorFlow is not at hand."""
    import google_crc32c
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    def masked_crc(data):
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    old, new = tmp_path / "old", tmp_path / "new"
    write_cifar10(str(old), num_train=20, num_test=10)
    expected = {split: records(old, "cifar10", split) for split in ("train", "test")}
    directory = old / "cifar10" / "3.0.2"
    for path in directory.glob("*.array_record*"):
        reader = ArrayRecordReader(str(path))
        with open(str(path).replace("array_record", "tfrecord"), "wb") as file:
            for record in reader.read_all():
                length = struct.pack("<Q", len(record))
                file.write(length + masked_crc(length) + record + masked_crc(record))
        reader.close()
        path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert tfds.builder("cifar10", data_dir=str(old)).info.file_format.value == "tfrecord"

    with raises_user_error("is in tfrecord format; expected array_record", f"cifar10 --from-tfrecord {old}"):
        open_split(DataConfig(data_dir=str(old)), "train")
    code, _ = command("cifar10", "--from-tfrecord", old, "--data-dir", new, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    for split, originals in expected.items():
        assert_same_records(records(new, "cifar10", split), originals)
    with raises_user_error("where the TFRecord data are; expected another directory"):
        tfrecord.convert("cifar10", str(old), str(old))

    (path,) = directory.glob("*train.tfrecord*")
    data = bytearray(path.read_bytes())
    for damaged in (data[:-5], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        path.write_bytes(damaged)
        with raises_user_error(f"{path} is damaged or cut short: the record at byte"):
            list(tfrecord.read_records(str(path)))


def test_the_command(tmp_path, monkeypatch, capsys):
    run = functools.partial(command, monkeypatch=monkeypatch, capsys=capsys)
    code, printed = run("digits", "--data-dir", tmp_path)
    assert (code, printed.out.splitlines()[-1]) == (0, f"digits is in {tmp_path}")
    assert len(records(tmp_path, "digits", "test")) == digits.NUM_TEST
    for name, expected in (
        ("nosuchdata", "'nosuchdata' cannot be opened as a data set of TFDS"),
        ("", "'' cannot be opened as a data set of TFDS"),
        ("cifar10:9.9.9", "'cifar10:9.9.9' cannot be opened as a data set of TFDS"),
        ("imagenette", "TFDS needs TensorFlow to prepare imagenette: pip install tensorflow"),
        ("imagenet2012", "ILSVRC2012_img_val.tar is missing"),
    ):
        code, printed = run(name, "--data-dir", tmp_path)
        (line,) = printed.err.splitlines()
        assert code == 2
        assert expected in line


def test_relative_paths_and_names_in_the_working_directory(tmp_path, monkeypatch):
    """`digits` is the data set, whatever directory of that name there is."""
    monkeypatch.chdir(tmp_path)
    for data_dir in (".", "./x", "y//z"):
        digits.prepare(data_dir)
        assert len(records(data_dir, "digits", "test")) == digits.NUM_TEST
        assert len(records(data_dir, "digits", "train")) == 1437


def test_a_data_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with raises_user_error("cannot write", str(tmp_path / "file" / "digits"), "--config.data.data_dir"):
        digits.prepare(str(tmp_path / "file"))


def test_a_full_disk_is_named_and_what_is_there_stays(tmp_path):
    """A limit to the size of files stands for it: array_record cannot finish the first."""
    code = """
import resource, signal, sys
from vgg_jax.data import digits
from vgg_jax.errors import report_mistakes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(report_mistakes("prepare", lambda: digits.prepare(sys.argv[1]) or 0))
"""
    process = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert f"cannot write {tmp_path / 'digits' / '1.0.0'}" in line
    assert "make room" in line
    assert len(records(tmp_path, "digits", "test")) == digits.NUM_TEST  # once there is room


def test_images_in_folders(tmp_path):
    random = np.random.default_rng(0)
    for split, classes in (("train", ("cat", "dog", "emu")), ("test", ("cat", "emu"))):
        for name in classes:
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(3):
                image = PIL.Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8))
                (directory / f"{i}.png").write_bytes(encoded(image, "PNG"))
            (directory / "notes.txt").write_text("no image")
    config = DataConfig(str(tmp_path), image_size=16, resize=16)
    split = open_split(config, "test")
    assert (len(split), split.num_classes, split.channels) == (6, 3, 3)
    assert [split.test_view(i)[1] for i in range(6)] == [0, 0, 0, 2, 2, 2]
    expected = np.asarray(PIL.Image.open(tmp_path / "test" / "emu" / "1.png"))
    np.testing.assert_array_equal(split.pixels(4)[0], expected)
    with raises_user_error("has no folder 'validation'; found test, train"):
        open_split(config, "validation")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with raises_user_error("none has no images"):
        open_split(config, "none")
    (tmp_path / "test" / "cat" / "0.png").unlink()
    with raises_user_error(f"{tmp_path}/test/cat/0.png cannot be read: No such file"):
        split.test_view(0)
    (tmp_path / "test" / "bee").mkdir()
    with raises_user_error("has classes that train has not: bee"):
        open_split(config, "test")


def test_a_member_outside_and_a_link_do_no_harm(tmp_path):
    """Archives are read, never unpacked: what a member is called does not matter."""
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../evil.JPEG", b"x")
        link = tarfile.TarInfo("link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [member.name for member in imagenet._members(str(path))] == ["../../evil.JPEG"]


def test_a_tfrecord_copy_where_array_record_is_expected_is_not_called_prepared(tmp_path, monkeypatch, capsys):
    write_cifar10(str(tmp_path), num_train=10, num_test=10)
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    code, printed = command("cifar10", "--data-dir", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "is in tfrecord format; expected array_record" in printed.err
