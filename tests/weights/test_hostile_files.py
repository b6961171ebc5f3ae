"""Wrong and hostile files of weights: they are named and refused, and nothing in them is executed."""

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import tarfile
import time
import zipfile

import jax.numpy as jnp
import pytest
import torch

from tests.conftest import raises_user_error
from tests.weights.test_layouts import variables_of
from vgg_jax import VGG, from_torch, load, to_torch
from vgg_jax.weights.formats import Loaded, load_file, save_file

SMALL = dict(depth=11, num_classes=3, pool_size=1, hidden=(8, 8))


def test_wrong_files_are_named_and_refused(tmp_path):
    with raises_user_error("nowhere.pth does not exist"):
        load_file(tmp_path / "nowhere.pth")
    (tmp_path / "a.bin").write_bytes(b"x")
    with raises_user_error("a.bin", "expected a .pth, .pt, .safetensors, .h5, .hdf5, .keras or .onnx file"):
        load_file(tmp_path / "a.bin")
    for name in ("cut.safetensors", "cut.pth", "cut.h5"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        with raises_user_error(name):
            load_file(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with raises_user_error("empty is not the directory of a run"):
        load(tmp_path / "empty")
    model = VGG(**SMALL)
    with raises_user_error("expected .pth, .pt, .safetensors or .weights.h5"):
        save_file(tmp_path / "w.npz", Loaded(model, variables_of(model)))
    with raises_user_error("missing, the folder of w.pth, does not exist"):
        save_file(tmp_path / "missing" / "w.pth", Loaded(model, variables_of(model)))


def test_damaged_pth_files_are_refused(tmp_path):
    path = tmp_path / "damaged.pth"
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] ^= 1  # the table of contents at the end
    path.write_bytes(content)
    with raises_user_error("damaged.pth", "not a whole archive"):
        load_file(path)
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    with raises_user_error("numbers.pth: holds a dict; expected a state dict"):
        load_file(tmp_path / "numbers.pth")


def test_nonfinite_weights_are_refused(tmp_path):
    model = VGG(**SMALL)
    variables = variables_of(model)
    variables["params"]["conv2_1"]["kernel"] = variables["params"]["conv2_1"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    save_file(tmp_path / "nan.safetensors", Loaded(model, variables))
    with raises_user_error("nan.safetensors", "not finite, in params/conv2_1/kernel"):
        load_file(tmp_path / "nan.safetensors")


class Call:
    """An object whose pickle calls `function` with `arguments` when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(sentinel):
    touch = f"open({sentinel!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {sentinel}"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "subprocess": Call(subprocess.check_call, ["touch", sentinel]),
        "open": Call(open, sentinel, "w"),
        "import": Call(__import__, "antigravity"),
        "nested in a state dict": {"features.0.weight": Call(eval, touch)},
        "as a name": {Call(os.system, f"touch {sentinel}"): torch.zeros(1)},
        "in a list": [Call(eval, touch)],
        "a module": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
@pytest.mark.parametrize("name", list(hostile("x")))
def test_malicious_pickles_execute_nothing(name, form, tmp_path):
    sentinel = tmp_path / "executed"
    path = tmp_path / "hostile.pth"
    payload = hostile(str(sentinel))[name]
    if form == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with raises_user_error("hostile.pth", "executes nothing"):
        load_file(path)
    assert not sentinel.exists()


def test_malicious_tar_executes_nothing(tmp_path):
    sentinel = tmp_path / "executed"
    path = tmp_path / "hostile.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Call(os.system, f"touch {sentinel}"))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with raises_user_error("hostile.pth"):
        load_file(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("hostile_name", ["../escaped", "link"])
def test_archives_that_reach_outside_are_refused(kind, hostile_name, tmp_path):
    """The archive is torch.save's with one more member: a path outside, or a link to one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "outside.pth"
    if kind == "zip":
        torch.save({"features.0.weight": torch.zeros(2)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            member = zipfile.ZipInfo(hostile_name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16 if hostile_name == "link" else 0
            archive.writestr(member, "../escaped")
        expected = f"outside.pth: an archive with {hostile_name!r}"
    else:
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                archive.addfile(tarfile.TarInfo(name))
            member = tarfile.TarInfo(hostile_name)
            if hostile_name == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "../escaped"
            archive.addfile(member)
        expected = "outside.pth: refused by torch.load"
    with raises_user_error(expected):
        load_file(path)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(folder) == ["outside.pth"]


def test_bombs_are_refused_by_their_headers(tmp_path):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**24))  # a gigabyte of zeros in a megabyte
    start = time.monotonic()
    with raises_user_error("bomb.pth", "1,073,741"):
        load_file(tmp_path / "bomb.pth")

    for shape, offsets in (([2**63 - 1], [0, 4]), ([2**40, 2**40], [0, 2**62]), ([4], [0, 2**40])):
        header = json.dumps({"features.0.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        (tmp_path / "bomb.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with raises_user_error("bomb.safetensors"):
            load_file(tmp_path / "bomb.safetensors")
    (tmp_path / "bomb.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with raises_user_error("bomb.safetensors"):
        load_file(tmp_path / "bomb.safetensors")
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes: one gigabyte


HOSTILE_WRAPPERS = {
    "deeply nested": (lambda: b"}" + b"X\x05\x00\x00\x00model}" * 20_000 + b"s" * 20_000, "holds a dict; expected"),
    "too deeply nested": (lambda: b"}" + b"X\x05\x00\x00\x00model}" * 105_000 + b"s" * 105_000, "100,000 dicts"),
    "cyclic": (lambda: b"}q\x00X\x05\x00\x00\x00modelh\x00s", "holds a dict; expected a state dict"),
    "many numbers": (lambda: b"](" + b"K\x01" * 900_000 + b"e", "holds a list; expected a state dict"),
    "a large pickle": (lambda: b"](" + b"}" * 5_000_000 + b"e", "holds more than 2,097,152 bytes of names"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", list(HOSTILE_WRAPPERS))
def test_hostile_wrappers_are_refused_in_time(name, zipped, tmp_path):
    import resource

    content, expected = HOSTILE_WRAPPERS[name]
    path = tmp_path / "hostile.pth"
    torch.save({}, path, _use_new_zipfile_serialization=zipped)
    body = b"\x80\x02" + content() + b"."
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for member, old in members.items():
                archive.writestr(member, body if member.endswith("data.pkl") else old)
    else:
        path.write_bytes(path.read_bytes().replace(b"\x80\x02}q\x00.", body))
        assert path.stat().st_size > len(body)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with raises_user_error("hostile.pth", expected):
        load_file(path)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes: one gigabyte


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_huge_numbers_of_names_are_refused(form, tmp_path):
    start = time.process_time()
    tensor = torch.zeros(1, 1, 1, 1)
    path = tmp_path / f"hostile.{form}"
    if form == "pth":
        torch.save({f"features.{i}.weight": tensor for i in range(10_001)}, path)
        expected = "holds more than 10,000 tensors"
    else:
        entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}
        header = json.dumps({f"features.{i}.weight": {**entry, "shape": [0]} for i in range(100_000)}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        expected = "bytes; expected"
    with raises_user_error(f"hostile.{form}", expected):
        load_file(path)
    assert time.process_time() - start < 5


def test_wrong_networks_list_every_mismatch(tmp_path):
    model = VGG(**SMALL)
    state_dict = {k: torch.from_numpy(a) for k, a in to_torch(model, variables_of(model)).items()}
    state_dict["features.3.weight"] = state_dict["features.3.weight"].transpose(0, 1).contiguous()
    del state_dict["features.0.bias"]
    state_dict["extra.weight"] = torch.zeros(1)
    torch.save(state_dict, tmp_path / "wrong.pth")
    with raises_user_error(
        "wrong.pth", "missing features.0.bias", "unexpected extra.weight", "features.3.weight has shape"
    ):
        load_file(tmp_path / "wrong.pth")
    with raises_user_error("missing features.1.running_mean"):
        from_torch({k: a.numpy() for k, a in state_dict.items()}, VGG(**SMALL, batch_norm=True))
