"""Several steps in one program: at the same steps as single ones, with the same results."""

import contextlib
import dataclasses
import functools
import re
import signal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.cli.test_train import saved_arrays
from tests.narrow import NARROW_TABLE
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.loader import Loader
from vgg_jax.training import blocks, loop, session
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.metrics import MetricAverages, NotFiniteError
from vgg_jax.training.sharding import AXIS


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Use narrow networks on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        patch.setattr(loop, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), (AXIS,)))
        yield
    jax.config.update("jax_enable_x64", False)  # as a run in float64 leaves it


@pytest.fixture(scope="module")
def config(data_dir):
    """Two epochs of nine steps, with evaluations after every fifth step and reports after every seventh."""
    return Config(
        model=ModelConfig(depth=11, batch_norm=False, pool_after=(1, 2, 3, 4), dtype="float64"),
        data=DataConfig(
            **dict(dataset="digits", data_dir=data_dir, classes=(0, 1), mean=(0.3,), std=(0.3,)),
            **dict(image_size=16, resize=16, pad=2, alternating_flip=True),
        ),
        optimizer=OptimizerConfig(learning_rate=0.01),
        **dict(batch_size=32, num_epochs=2, log_every_steps=7, eval_every_epochs=0.55),
        freeze=("features",),  # compiles faster
    )


# The networks compute in float64, but the schedule and the normalized images are float32. If XLA:CPU fuses them in
# another way, last bits differ: up to 1e-8 was seen. A missing or repeated step changes the loss by more than 1e-3.
ROUNDING = 1e-7


def train(config, workdir, stop=None, **changes):
    """Train, stop by SIGTERM after a step if one is given, and return the numbers of steps of the programs."""
    taken = []
    take = session.Session.take_steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            session.Session,
            "take_steps",
            lambda self, steps, inputs: (taken.append(len(steps)), take(self, steps, inputs)),
        )
        patch.setattr(session.StopSignals, "received_before", lambda _, step: signal.SIGTERM if step == stop else None)
        code = loop.train_and_evaluate(dataclasses.replace(config, **changes), str(workdir))
    assert code == (0 if stop is None else 128 + signal.SIGTERM)
    return taken


def recorded(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    measured = ("images_per_second", "model_flops_per_second")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines if line["kind"] != "memory"]


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """Return the directory of a run of single steps."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    assert train(config, workdir) == [1] * 18
    return workdir


def assert_same(workdir, single, rtol=0.0):
    for line, expected in zip(recorded(workdir), recorded(single), strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            same = value == (expected[name] if name == "kind" else pytest.approx(expected[name], rel=rtol, abs=0))
            assert same, (name, value, expected)
    expected = saved_arrays(single)
    for name, array in saved_arrays(workdir).items():
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def in_blocks(config, tmp_path_factory):
    """Return the directory of a run in blocks of four steps."""
    workdir = tmp_path_factory.mktemp("blocks") / "run"
    assert train(config, workdir, steps_per_dispatch=4) == [4, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1]
    return workdir


def test_blocks_equal_single_steps(single, in_blocks):
    """Reports, evaluations and saves come after the same steps. XLA:CPU fuses other operations, so bits may differ."""
    assert_same(in_blocks, single, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "programs"),
    [(2, [2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 1]), (3, [3, *[1] * 7, 3, 1, 1, 3])],
)
def test_blocks_of_any_length_equal_single_steps(length, programs, config, single, tmp_path):
    assert train(config, tmp_path / "run", steps_per_dispatch=length) == programs
    assert_same(tmp_path / "run", single, ROUNDING)


def test_signal_within_a_block_stops_after_it(config, in_blocks, tmp_path, capsys):
    """The resumed run has the bits of the uninterrupted one."""
    assert train(config, tmp_path / "run", stop=12, steps_per_dispatch=4) == [4, 1, 1, 1, 1, 1, 1, 4]
    assert "stopped at step 14 (saved)" in capsys.readouterr().out
    assert train(config, tmp_path / "run", steps_per_dispatch=4) == [1, 1, 1, 1]
    assert_same(tmp_path / "run", in_blocks)


def test_each_program_is_one_dispatch_without_transfers(config, tmp_path, monkeypatch):
    """Between the first report and the last step nothing is compiled or sent implicitly to the devices."""
    calls, compiled = [], []
    call, take = jax.stages.Compiled.__call__, session.Session.take_steps
    monkeypatch.setattr(jax.stages.Compiled, "__call__", lambda *a, **b: (calls.append(1), call(*a, **b))[1])

    def guarded(self, steps, inputs):
        take(self, steps, inputs)
        if steps[0] == 2:
            monkeypatch.setattr(jax._src.compiler, "compile_or_get_cached", lambda *_, **__: compiled.append(1))
            guard.enter_context(jax.transfer_guard_host_to_device("disallow"))
        if steps[-1] == 18:
            guard.close()

    monkeypatch.setattr(session.Session, "take_steps", guarded)
    once = dict(log_every_steps=1, eval_every_epochs=2, checkpoint_every_epochs=2)
    with contextlib.ExitStack() as guard:
        assert loop.train_and_evaluate(dataclasses.replace(config, **once), str(tmp_path / "run")) == 0
    assert len(calls) == 18 + 2  # the initialization and the batch of the evaluation
    assert compiled == []


@pytest.mark.parametrize(
    ("end", "periods", "length"),
    [
        (200 * 390, {50, 390}, 10),  # configs/vgg16.py
        (2640, {22}, 22),
        (18, {1, 9}, 1),
        (10**6, {10**6}, 50),  # 50 is the longest
        (89, {89}, 44),
    ],
)
def test_automatic_blocks_need_the_fewest_programs(end, periods, length):
    assert blocks.best_length(end, periods) == length


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_every_event_ends_a_block(length):
    steps = list(blocks.lengths(blocks.gaps(3, 100, {7, 12}, (20, 31)), length))
    ends = {3 + sum(steps[: i + 1]) for i in range(len(steps))}
    assert {20, 31, 100, *range(7, 100, 7), *range(12, 100, 12)} <= ends
    assert set(steps) <= {1, length}
    assert max(ends) == 100


def stacked(*steps):
    return {name: np.array([step[name] for step in steps]) for name in steps[0]}


def metrics(loss, *finite):
    return {"loss": np.float32(loss), "accuracy": np.float32(0.5), "finite": np.array(finite)}


def test_skipped_steps_of_a_block_are_counted_and_named(capsys):
    averages = MetricAverages(["images", "loss"], max_skipped=3, queue=2)
    bad = metrics(np.nan, True, False)
    for end in (3, 6):
        averages.add(end, _on_device(stacked(metrics(2.0, True, True), bad, metrics(4.0, True, True))))
    assert averages.skipped == 0  # not read yet, so that the devices need not wait
    assert averages.report() == {"loss": 3.0, "accuracy": 0.5}
    assert averages.skipped == 2
    assert capsys.readouterr().out.splitlines() == [f"skipped step {i}: loss is not finite" for i in (2, 5)]
    averages.add(9, _on_device(stacked(metrics(1.0, True, True), bad, bad)))
    averages.add(12, _on_device(stacked(bad, metrics(1.0, True, True), bad)))
    with pytest.raises(NotFiniteError, match="3 steps in a row were skipped, from step 8: loss was not"):
        averages.state()


def _on_device(arrays):
    return {name: jax.numpy.asarray(array) for name, array in arrays.items()}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_block_lowers_to_one_loop(platform, config):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    run = loop.build(config, loop.make_mesh())
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), run.shapes)
    inputs = next(run.train_loader.train_inputs(0, 32, range(8), lengths=[8]))
    text = run.train_steps.trace(state, inputs, run.step_key).lower(lowering_platforms=(platform,)).as_text()
    main = text[text.index("@main") :]
    main = main[: main.index("func.func", 1)]
    assert main.count("stablehlo.while") == 1
    assert re.search(r"dense<8> : tensor<i(32|64)>", main)  # a known length: the devices do not ask the host
    assert main.count("jax.buffer_donor") + main.count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_streamed_data_take_single_steps(config, tmp_path, capsys):
    """A note names the reason if the configuration asks for blocks."""
    streamed = functools.partialmethod(Loader.__init__, resident=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__init__", streamed)
        assert train(config, tmp_path / "run", num_epochs=3 / 9, steps_per_dispatch=4) == [1, 1, 1]
    note = "note: config.steps_per_dispatch=4 needs resident data; these are streamed: 1 step for each dispatch"
    assert note in capsys.readouterr().err
