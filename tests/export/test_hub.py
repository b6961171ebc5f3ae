"""Push and load by the real client of the hub, against a server that stands for the hub."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from tests.conftest import raises_user_error
from tests.export.hub_server import TOKEN, serve
from tests.export.pages import snippets

# Commands of one client: a process with HF_ENDPOINT, because huggingface_hub reads its settings at its import.
CLIENT = """
import contextlib, io, json, os, sys, time, traceback, types
import numpy as np
import vgg_jax.model
from tests.narrow import NARROW_TABLE
vgg_jax.model.TABLE_1 = NARROW_TABLE
import huggingface_hub.file_download as downloads
import huggingface_hub.utils._http as http
from tests.conftest import random_variables
from vgg_jax import IMAGENET, VGG, Network, load

http.http_backoff.__kwdefaults__.update(max_retries=1, base_wait_time=0) if http.http_backoff.__kwdefaults__ else None
downloads.time = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # it tries six times
model = VGG(11, num_classes=3, hidden=(32, 4096))
net = Network(model, random_variables(model, 32, 32, 3), IMAGENET, ("cat", "dog", "cow"))


def loaded(source):
    back = load(source)
    same = all(
        np.array_equal(back.variables["params"][layer][leaf], array)
        for layer, leaves in net.variables["params"].items()
        for leaf, array in leaves.items()
    )
    return [same, back.classes, back.model == net.model, back.preprocessing == net.preprocessing]


for line in sys.stdin:
    command, environment = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            answer = eval(command)
        except Exception as error:
            answer = [type(error).__name__, str(error)]
    print(json.dumps([answer, errors.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Return the server's state, the folder of the client's cache, and a function that runs an expression there."""
    home = tmp_path_factory.mktemp("home")
    with serve() as (state, address):
        settings = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "VGG_JAX_SETTINGS": "off"}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        root = pathlib.Path(__file__).parent.parent.parent
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=os.environ | settings | {"PYTHONPATH": str(root)}, cwd=root, **pipes
        ) as client:

            def run(command, token=TOKEN):
                client.stdin.write(json.dumps([command, {"HF_TOKEN": token} if token else {}]) + "\n")
                return json.loads(client.stdout.readline())

            temporary = pathlib.Path(settings["TMPDIR"])
            yield types.SimpleNamespace(state=state, cache=home / "hub", run=run, temporary=temporary)
            client.stdin.close()


@pytest.fixture(autouse=True)
def without_faults(hub):
    yield
    hub.state.fault = None
    assert not list(hub.temporary.iterdir())


def partial_files(cache):
    return [path for path in cache.rglob("*") if path.name.endswith((".incomplete", ".partial"))]


def assert_one_line(answer, *parts):
    kind, message = answer
    assert kind == "UserError", answer
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_pushed_network_is_loaded_unchanged(hub):
    state, run = hub.state, hub.run
    url, errors = run("net.push_to_hub('me/vgg')")
    identifier, files = state.commits["me/vgg"][0]
    assert url.endswith(f"/me/vgg/commit/{identifier}")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert "# vgg\n" in files["README.md"].decode()
    assert len(state.commits["me/vgg"]) == 1, "one commit"
    assert not errors
    answer, errors = run("loaded('hf-hub:me/vgg')", token=None)
    assert answer == [True, ["cat", "dog", "cow"], True, True]
    asked = len(state.requests)
    assert run("loaded('hf-hub:me/vgg')")[0][0] is True
    assert not [line for line in state.requests[asked:] if line.startswith("GET")], "read from the cache"


def test_revision_selects_the_commit(hub):
    state, run = hub.state, hub.run
    run("net.push_to_hub('me/two')")
    run("__import__('dataclasses').replace(net, classes=('a', 'b', 'c')).push_to_hub('me/two')")
    first = state.commits["me/two"][0][0]
    state.branches["me/two", "v1"] = 0
    for revision, names in (
        ("@v1", ["cat", "dog", "cow"]),
        (f"@{first}", ["cat", "dog", "cow"]),
        ("", ["a", "b", "c"]),
    ):
        assert run(f"loaded('hf-hub:me/two{revision}')")[0][1] == names
    assert_one_line(run("loaded('hf-hub:me/two@v9')")[0], "hf-hub:me/two@v9", "no such revision; choose a branch")


def test_existing_card_is_kept(hub):
    state, run = hub.state, hub.run
    run("net.push_to_hub('me/card', card='# Mine')")
    run("__import__('dataclasses').replace(net, classes=None).push_to_hub('me/card')")
    assert [files["README.md"] for _, files in state.commits["me/card"]] == [b"# Mine"] * 2


def test_wrong_token_is_one_line(hub):
    state, run = hub.state, hub.run
    answer, _ = run("net.push_to_hub('me/secret')", token="hf_wrong")
    assert_one_line(answer, "cannot push me/secret: the hub does not know", "(401)", "run `hf auth login`")
    assert "me/secret" not in state.commits
    assert_one_line(run("loaded('hf-hub:me/vgg2')", token="hf_wrong")[0], "cannot load hf-hub:me/vgg2", "(401)")


def test_dropped_upload_commits_nothing(hub):
    state, run = hub.state, hub.run
    state.fault = "drop upload"
    answer, _ = run("__import__('dataclasses').replace(net, classes=('x', 'y', 'z')).push_to_hub('me/drop')")
    assert_one_line(answer, "cannot push me/drop", "check the connection, then rerun")
    assert state.commits["me/drop"] == []
    state.fault = None
    assert "/me/drop/commit/" in run("net.push_to_hub('me/drop')")[0]


def test_dropped_download_leaves_nothing(hub):
    state, run = hub.state, hub.run
    run("net.push_to_hub('me/half')")
    state.fault = "drop download"
    assert_one_line(
        run("loaded('hf-hub:me/half')")[0], "cannot load hf-hub:me/half", "check the connection, then rerun"
    )
    assert not partial_files(hub.cache)
    state.fault = None
    assert run("loaded('hf-hub:me/half')")[0][0] is True


def test_wrong_checksum_removes_the_file(hub):
    state, run = hub.state, hub.run
    run("net.push_to_hub('me/flip')")
    state.fault = "corrupt"
    answer, _ = run("loaded('hf-hub:me/flip')")
    assert_one_line(answer, "hf-hub:me/flip: model.safetensors has sha256", "the file was removed; load it again")
    assert not list((hub.cache / "models--me--flip").rglob("model.safetensors"))
    assert not partial_files(hub.cache)
    state.fault = None
    assert run("loaded('hf-hub:me/flip')")[0][0] is True


def test_unreachable_hub_is_one_line(hub, monkeypatch):
    import huggingface_hub

    from vgg_jax import load

    def unreachable(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with raises_user_error("cannot load hf-hub:me/vgg: it is not cached, and the hub cannot be reached; check"):
        load("hf-hub:me/vgg")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("hf-hub:me/missing", "the hub has no such repository; check the name"),
        ("hf-hub:a/b/c", "expected owner/name"),
        ("hf-hub:me/empty", "no config.json; expected a folder of timm or vgg_jax"),
        ("hf-hub:me/no-weights", "holds no weights; expected model.safetensors or pytorch_model.bin"),
        ("hf-hub:me/resnet", "states the architecture 'resnet18'; expected one of timm's vgg11"),
    ],
)
def test_unusable_repository_is_one_line(source, part, hub):
    state, run = hub.state, hub.run
    state.commits |= {name: [] for name in ("me/empty", "me/no-weights", "me/resnet")}
    state.commit("me/empty", {"README.md": b""})
    state.commit("me/no-weights", {"config.json": b"{}"})
    if "me/vgg" not in state.commits:
        run("net.push_to_hub('me/vgg')")
    weights = bytearray(state.commits["me/vgg"][0][1]["model.safetensors"].replace(b'"vgg"', b'"not"'))
    state.commit("me/resnet", {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": bytes(weights)})
    assert_one_line(run(f"loaded({source!r})")[0], source.removeprefix("hf-hub:"), part)


def test_push_section_of_the_page_runs(hub):
    code = next(text for text in snippets("hub.md") if "push_to_hub" in text)
    answer, _ = hub.run(f"exec({code!r}, globals())")
    assert answer is None
    assert sorted(hub.state.commits["me/vgg11"][0][1]) == ["README.md", "config.json", "model.safetensors"]
    hub.run("globals().update(net=load('hf-hub:me/vgg11'))")


def test_flipped_bit_in_the_cache_is_found(hub):
    """huggingface_hub compares sizes only, and takes a cached file as it is."""
    run = hub.run
    run("net.push_to_hub('me/disk')")
    assert run("loaded('hf-hub:me/disk')")[0][0] is True
    (path,) = (hub.cache / "models--me--disk").rglob("config.json")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"cat", b"bat"))
    assert_one_line(run("loaded('hf-hub:me/disk')")[0], "config.json has git sha1", "load it again")
    assert run("loaded('hf-hub:me/disk')")[0][0] is True
