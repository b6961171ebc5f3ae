"""Exhausted memory: one line with the failed allocation, what the command needs and what reduces it; exit code 2.

The memory of the processes is limited after compilation, so that the C library really refuses an allocation. Compilers
end the process if the limit comes earlier.
"""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.cli.test_train import ROOT, command
from tests.conftest import raises_user_error, random_variables
from vgg_jax import VGG, Network
from vgg_jax.config import Config, ModelConfig
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import out_of_memory, report_mistakes
from vgg_jax.training.memory import explains_out_of_memory

LIMIT = """
import resource
from vgg_jax import runtime

runtime._request_huge_pages = lambda: None  # otherwise the heap has addresses left within the limit

def limit():
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + 2**24
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
"""
TRAIN = """
import sys
from vgg_jax.cli import train
from vgg_jax.training import compilation, session
from tests.narrow import NARROW_TABLE
import vgg_jax.model

vgg_jax.model.TABLE_1 = NARROW_TABLE
result, run_memory = compilation.Compilation.result, session.run_memory

def whole_result(self):
    programs = result(self)
    programs.eval_step.result()
    return programs

def limited(*arguments):
    memory = run_memory(*arguments)
    limit()
    return memory

compilation.Compilation.result = whole_result
session.run_memory = limited
sys.exit(train.main())
"""
PREDICT = """
import sys
from vgg_jax.cli import predict
from vgg_jax.evaluation.programs import CompiledAhead

program_of = CompiledAhead.program_of

def limited(ahead, network):
    program = program_of(ahead, network)
    assert program is not None

    def limited_program(*arguments):
        limit()
        return program(*arguments)

    return limited_program

CompiledAhead.program_of = limited
sys.exit(predict.main(sys.argv[1:]))
"""


def error_of(code, *arguments):
    process = subprocess.run([sys.executable, "-c", LIMIT + code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    return error


def test_training_names_what_it_needs_and_the_remedies(data_dir, tmp_path):
    fields = (
        *("model.depth=11", "data.image_size=128", "data.resize=128", "batch_size=256", "data.classes=(0, 1)"),
        *("freeze=('features',)", "model.batch_norm=False", "optimizer.warmup_epochs=0"),
    )
    _, _, *arguments = command("digits.py", tmp_path / "run", data_dir, *fields)
    error = error_of(TRAIN, *arguments)
    assert error.startswith("train.py: error: out of memory: an allocation of ")
    assert " GiB failed; a step needs " in error
    for remedy in ("lower config.batch_size (now 256)", "accumulation_steps (now 1)", "config.model.remat=True"):
        assert remedy in error


def test_prediction_names_its_batch_size(tmp_path):
    model = VGG(11, num_classes=5, pool_size=1, hidden=())
    weights = tmp_path / "vgg.safetensors"
    classes = tuple("abcde")
    Network(model, random_variables(model, 32, 32, 3), Preprocessing(512, 512), classes).save(weights)
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for path in paths:
        PIL.Image.new("RGB", (512, 512)).save(path)
    error = error_of(PREDICT, "--weights", str(weights), *map(str, paths))
    assert error.startswith("predict: error: out of memory: an allocation of ")
    assert error.endswith("failed; lower --batch-size (now 32)")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes."), "of 3.00 GiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB."), "of 1.50 GiB"),
        (RuntimeError("INTERNAL: std::bad_alloc"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("INVALID_ARGUMENT: shapes differ"), None),
        (ValueError("Out of memory"), None),
    ],
)
def test_messages_of_exhausted_memory_are_recognized(error, expected):
    found = out_of_memory(error)
    assert found is None if expected is None else expected in found


def test_exhausted_memory_of_numpy_gives_one_line(capsys):
    assert report_mistakes("evaluate", lambda: len(np.empty(2**50)), "lower --batch-size (now 16)") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "evaluate: error: out of memory: an allocation of 8.00 PiB failed; lower --batch-size (now 16)"


def test_training_out_of_memory_at_compilation_has_no_figures():
    """On a GPU the compiler raises this error. On a CPU it ends the process, so the error is simulated."""
    with (
        raises_user_error("out of memory: an allocation of 2.00 GiB failed; lower config.batch_size (now 128)"),
        explains_out_of_memory(Config(ModelConfig(remat=True))),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.")


def test_other_errors_of_a_run_pass():
    with pytest.raises(RuntimeError, match="another"), explains_out_of_memory(Config()):
        raise RuntimeError("another problem")
