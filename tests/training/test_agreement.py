"""Two real processes that disagree, or one that fails: both end with one line, and nothing is written."""

import shutil
import socket
import subprocess
import sys
import time

import PIL.Image
import pytest

from tests.cli.test_train import NARROW, ROOT, SMALL_IMAGES, command
from tests.conftest import raises_user_error
from tests.training.test_checkpoints import small_state
from vgg_jax.cli.train import main
from vgg_jax.training import agreement
from vgg_jax.training.agreement import exchange, require_equal
from vgg_jax.training.checkpoints import Checkpoints

# Join two processes, then compare several things in turn. Each differs in one of the processes.
COMPARISONS = """
import dataclasses, sys
import jax
from vgg_jax.config import Config, DataConfig
from vgg_jax.data.dataset import open_split
from vgg_jax.data.transforms import Views
from vgg_jax.errors import UserError
from vgg_jax.training.agreement import exchange
from vgg_jax.training.comparison import compare_checkpoints, compare_runs, compare_start
from vgg_jax.training.processes import joined

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def attempt(name, function, *arguments):
    try:
        function(*arguments)
        line = "accepted"
    except UserError as error:
        line = str(error)
    print(f"{name}: {line}", file=sys.stderr, flush=True)

def split(name, part="train"):
    return open_split(f"{folder}/{name}", part, Views(32, 32, "pad_crop", (32, 32), True), data_dir="")

with joined(address, 2, process):
    assert jax.device_count() == 2
    assert exchange(process) == [0, 1]
    config, a = Config(), split("a")
    here = dataclasses.replace(config, data=DataConfig(data_dir=f"/{process}", num_threads=process + 1))
    attempt("machine", compare_runs, here, a, a)
    attempt("fields", compare_runs, dataclasses.replace(config, seed=process, batch_size=64 + process), a, a)
    attempt("number", compare_runs, config, a, split("a", "train[:50%]") if process else a)
    attempt("files", compare_runs, config, a, split("renamed") if process else a)
    attempt("content", compare_runs, config, split("repainted") if process else a, a)
    attempt("labels", compare_runs, config, split("relabeled") if process else a, a)
    attempt("checkpoints", compare_checkpoints, "run/checkpoints", [] if process else [20, 30])
    attempt("start", compare_start, 30 - 10 * process)
"""


def write_images(folder, color, *names):
    for name in names:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 40), color).save(path)


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_both(commands, timeout=100, **options):
    """Return the exit codes, the outputs and the lines on standard error of processes that run at the same time."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(arguments, **pipes, **options) for arguments in commands]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
        errors = [[line for line in error.splitlines() if not line.startswith("note: ")] for _, error in outputs]
        return [process.returncode for process in processes], errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The answer of each process to each comparison."""
    folder = tmp_path_factory.mktemp("data")
    names = ("x/1.png", "x/2.png", "y/3.png", "y/4.png")
    write_images(folder / "a", "red", *names)
    write_images(folder / "renamed", "red", *names[:3], "y/5.png")
    write_images(folder / "repainted", "red", *names[:3])
    write_images(folder / "repainted", "blue", names[3])
    write_images(folder / "relabeled", "red", *names[:2], "y/3.png", "x/4.png")
    address = free_address()
    commands = [[sys.executable, "-c", COMPARISONS, address, str(i), str(folder)] for i in range(2)]
    codes, errors = run_both(commands, cwd=ROOT)
    assert codes == [0, 0], errors
    return [dict(line.split(": ", 1) for line in lines if ": " in line) for lines in errors]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("machine", "accepted"),
        (
            "fields",
            "the processes differ: config.batch_size is 65 in process 1, 64 in process 0; config.seed is 1 in process "
            "1, 0 in process 0; start all processes with the same command and packages",
        ),
        ("number", "the number of evaluation examples is 2 in process 1, 4 in process 0; "),
        ("files", "the digest of the files of the evaluation examples is "),
        ("content", "the processes differ: the digest of training example 3 is "),
        ("labels", "the digest of the files of the training examples is "),
        (
            "checkpoints",
            "the list of checkpoints is [] in process 1, [20, 30] in process 0; put run/checkpoints on a disk that all",
        ),
        ("start", "the start step is 20 in process 1, 30 in process 0; "),
    ],
)
def test_difference_is_named_in_both_processes(name, found, compared):
    assert found in compared[0][name]
    assert compared[0][name] == compared[1][name]


def train_both(workdirs, data_dir, *fields):
    """Run `train.py` in two processes; `fields` are those of each. Return the exit codes and the lines of errors."""
    common = (*SMALL_IMAGES, "data.classes=(0, 1)", "batch_size=32", "num_epochs=1", "optimizer.warmup_epochs=0")
    address = free_address()
    commands = [
        [
            *command("digits.py", workdirs[i], data_dir, *common, *fields[i], script=NARROW),
            *("--coordinator", address, "--num_processes=2", f"--process_id={i}"),
        ]
        for i in range(2)
    ]
    start = time.monotonic()
    codes, errors = run_both(commands)
    assert codes == [0, 0] or time.monotonic() - start < 60
    return codes, errors


@pytest.mark.slow
def test_failure_of_the_first_process_ends_both(data_dir, tmp_path):
    """The data are missing on the first machine only."""
    workdir = tmp_path / "run"
    codes, errors = train_both([workdir] * 2, data_dir, [f"data.dataset={tmp_path / 'none'}"], [])
    assert codes == [2, 2], errors
    problem = f"{tmp_path / 'none'} does not exist; expected a directory with SPLIT/CLASS/IMAGE or of TFDS"
    assert [len(lines) for lines in errors] == [1, 1], errors
    assert f"error: {problem}" in errors[0][0]
    assert f"error: process 0 of 2 has ended: {problem}" in errors[1][0]
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (["seed=1"], "the processes differ: config.seed is 1 in process 1, 0 in process 0; "),
        (["data.train_split=train[:50%]"], 'config.data.train_split is "train[:50%]" in process 1, "train" in '),
        (["sed=1"], "config.sed is not a field"),
    ],
    ids=["configuration", "split", "mistake"],
)
def test_two_commands_that_differ_are_refused(fields, found, data_dir, tmp_path):
    workdir = tmp_path / "run"
    codes, errors = train_both([workdir] * 2, data_dir, [], fields)
    assert codes == [2, 2], errors
    assert [len(lines) for lines in errors] == [1, 1], errors
    assert all(found in lines[0] for lines in errors), errors
    assert not workdir.exists()


@pytest.mark.slow
def test_checkpoints_of_one_process_only_are_refused(data_dir, tmp_path):
    """The second process has a directory of its own, with the files that the first one has, but no checkpoint."""
    both = [tmp_path / "0", tmp_path / "1"]
    codes, errors = train_both([both[0]] * 2, data_dir, [], [])
    assert codes == [0, 0], errors
    shutil.copytree(both[0], both[1], ignore=shutil.ignore_patterns("checkpoints"))
    (both[1] / ".lock").touch()
    before = [sorted(str(path) for path in workdir.rglob("*")) for workdir in both]
    codes, errors = train_both(both, data_dir, ["num_epochs=2"], ["num_epochs=2"])
    assert codes == [2, 2], errors
    for lines in errors:
        assert "the list of checkpoints is [] in process 1, [" in lines[0]
    after = [sorted(str(path) for path in workdir.rglob("*") if path.name != ".lock") for workdir in both]
    assert after == [[path for path in paths if not path.endswith(".lock")] for paths in before]


@pytest.mark.slow
def test_full_disk_of_the_first_process_ends_both(data_dir, tmp_path):
    """A limit on the size of files stands for a full disk."""
    address = free_address()
    arguments = command("digits.py", tmp_path, data_dir, *SMALL_IMAGES, "data.classes=(0, 1)", script=NARROW)
    arguments += ["--coordinator", address, "--num_processes=2", "--config.checkpoint_every_epochs=0.1"]
    limited = ["sh", "-c", 'ulimit -f 60; exec "$@"', "sh", *arguments, "--process_id=0"]
    codes, errors = run_both([limited, [*arguments, "--process_id=1"]])
    assert codes == [2, 2], errors
    assert "train.py: error: cannot save a checkpoint in " in errors[0][-1]
    assert "error: process 0 of 2 has ended: cannot save a checkpoint in " in errors[1][-1]


def test_one_process_agrees_with_itself():
    assert exchange({"a": 1}) == [{"a": 1}]
    require_equal({"a": 1}, "do nothing")


def test_many_differences_are_counted(monkeypatch):
    monkeypatch.setattr(agreement, "exchange", lambda facts: [facts, dict.fromkeys(facts, "x" * 500)])
    with raises_user_error("a is ", "c is ", "; 2 more; start again", "..."):
        require_equal(dict.fromkeys("abcde", 0), "start again")


def test_checkpoint_damaged_for_one_process_is_skipped_by_all(tmp_path, monkeypatch):
    """Another process cannot read the newest checkpoint, although this one can."""
    checkpoints = Checkpoints(str(tmp_path))
    for step in (10, 20):
        checkpoints.save(small_state(step), None)
    checkpoints.close()
    answers = iter([[None, "it cannot be read: I/O error"]])
    monkeypatch.setattr(
        "vgg_jax.training.checkpoints.exchange", lambda problem: next(answers, [problem]) if not problem else [problem]
    )
    again = Checkpoints(str(tmp_path))
    assert int(again.restore(small_state(0))[0].step) == 10


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--local_device_ids", "0"], "--coordinator is missing"),
        (["--coordinator=a:1", "--local_device_ids=x"], "--local_device_ids is 'x'; expected the numbers of GPUs"),
        (["--config", "digits", "--process_id", "x"], "--process_id"),
    ],
)
def test_mistake_in_the_process_flags_is_named(arguments, found, capsys):
    assert main(arguments) == 2
    assert found in capsys.readouterr().err


def test_process_flags_reach_jax(monkeypatch):
    given = {}

    def initialize(*arguments, **options):
        given["arguments"] = arguments
        raise ValueError("not today")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    flags = ["--coordinator", "a:1", "--num_processes", "2", "--process_id", "1", "--local_device_ids", "1,3"]
    assert main(["--config", "digits", *flags]) == 2
    assert given["arguments"] == ("a:1", 2, 1, [1, 3])
