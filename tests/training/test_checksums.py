"""Checksums of checkpoints: made in the background, from the rows that each process holds, on any number of devices."""

import hashlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.array import ArrayImpl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import raises_user_error
from vgg_jax.training import checksums
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.checksums import MODULUS, OWN_CHECKSUM, named_leaves, row_sums
from vgg_jax.training.host_copy import Part, owned_parts
from vgg_jax.training.sharding import AXIS, state_shardings, with_sharding
from vgg_jax.training.state import TrainState

RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(56, 12)).astype(np.float32)


def state_on(devices, step=10):
    """Return a state whose dense kernel and its momentum are sharded over the devices."""
    params = {
        "fc8": {"kernel": jnp.asarray(KERNEL)},
        "conv1_1": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    }
    state = TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), batch_stats={}, head_layers=("fc8",)
    ).replace(step=jnp.asarray(step))
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    return jax.device_put(state, state_shardings(state, mesh, shard_head=True))


def shapes_on(devices):
    state = state_on(devices)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return jax.tree.map(lambda shape, leaf: with_sharding(shape, leaf.sharding), shapes, state)


@pytest.fixture
def no_gather(monkeypatch):
    """Refuse to read an array as a whole if its devices hold different shards."""
    value = ArrayImpl._value

    def read(array):
        assert array.is_fully_replicated, f"the shards of an array of shape {array.shape} are gathered"
        return value.fget(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(read))


def whole(name, array):
    return Part(name, array.shape, slice(None), array)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (8, 3), (3, 3, 16, 4)])
def test_sum_equals_the_hashes_of_the_rows(shape):
    array = np.asarray(RANDOM.normal(size=shape))
    rows = [np.take(array, k, -2) for k in range(shape[-2])] if len(shape) > 1 else [array]
    header = f"float64 {shape} ".encode()
    digests = [hashlib.sha256(header + k.to_bytes(8, "little") + row.tobytes()).digest() for k, row in enumerate(rows)]
    expected = sum(int.from_bytes(digest, "little") for digest in digests) % MODULUS
    assert row_sums([whole("a", array)]) == ({"a": expected} if rows else {})


@pytest.mark.parametrize(("devices", "per_process"), [(8, 2), (7, 1), (8, 4)])
def test_processes_share_the_rows_and_sum_to_the_whole(devices, per_process, no_gather):
    """Devices stand for processes: the parts of all processes together are each array once."""
    arrays = named_leaves(state_on(devices))
    total, held = {}, []
    for process in range(-(-devices // per_process)):
        parts = [
            Part(part.name, part.shape, part.rows, np.asarray(part.array))
            for part in owned_parts(arrays, process, per_process)
        ]
        held.append(sum(part.array.nbytes for part in parts))
        for name, number in row_sums(parts).items():
            total[name] = (total.get(name, 0) + number) % MODULUS
    alone = row_sums([whole(name, np.asarray(leaf)) for name, leaf in named_leaves(state_on(1)).items()])
    assert total == alone
    assert sum(held) == sum(leaf.nbytes for leaf in arrays.values())


def test_sharded_checkpoint_is_verified_on_other_devices(no_gather, tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state_on(8), None)
    checkpoints.close()
    for devices in (1, 2, 7, 8):
        state, _ = Checkpoints(str(tmp_path)).restore(shapes_on(devices))
        kernel = state.params["fc8"]["kernel"]
        assert len(kernel.sharding.device_set) == devices
        for shard in kernel.addressable_shards:
            np.testing.assert_array_equal(shard.data, KERNEL[shard.index])


def test_changed_row_of_a_shard_is_named(no_gather, tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state_on(8), None)
    checkpoints.close()
    total = checksums.read_sums(str(tmp_path / "10"))
    changed = total | {"params/fc8/kernel": total["params/fc8/kernel"] + 1}
    monkeypatch.setattr(checksums, "read_sums", lambda path: changed)
    with raises_user_error("step 10: params/fc8/kernel failed the checksum"):
        Checkpoints(str(tmp_path)).restore(shapes_on(2))


def test_hashing_leaves_the_loop_alone(tmp_path, monkeypatch):
    """A save returns before its arrays are hashed, and is complete only afterwards."""
    threads, allowed = set(), threading.Event()
    sum_of_rows = checksums._sum_of_rows

    def recorded(part, rows):
        threads.add(threading.get_ident())
        assert allowed.wait(60)
        return sum_of_rows(part, rows)

    monkeypatch.setattr(checksums, "_sum_of_rows", recorded)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state_on(8), None)
    assert saved_steps(tmp_path) == []
    allowed.set()
    checkpoints.close()
    assert saved_steps(tmp_path) == [10]
    assert threads
    assert threading.get_ident() not in threads


def test_failed_hashing_fails_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "row_sums", lambda parts: 1 / 0)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state_on(1), None)
    with raises_user_error("cannot save a checkpoint", "division by zero"):
        checkpoints.check(wait=True)
    assert saved_steps(tmp_path) == []


def test_copies_of_all_arrays_start_before_the_first_is_read(monkeypatch, tmp_path):
    events = []
    start, value = ArrayImpl.copy_to_host_async, ArrayImpl._value
    monkeypatch.setattr(ArrayImpl, "copy_to_host_async", lambda array: (events.append("start"), start(array))[1])
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda array: (events.append("read"), value.fget(array))[1]))
    state = state_on(1)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints._host_copy.update(state)
    count = len(jax.tree.leaves(state))
    assert events[:count] == ["start"] * count


@pytest.mark.parametrize("damaged", [False, True])
def test_checksums_of_older_versions_are_verified(damaged, tmp_path):
    """Older versions kept the SHA-256 of each whole array in the metadata."""
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state_on(1), None)
    checkpoints.close()
    path = tmp_path / "10" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    own = metadata["custom_metadata"]
    del own["processes"], own[OWN_CHECKSUM]
    tree = {name: getattr(state_on(1), name) for name in ("step", "params", "batch_stats", "opt_state")}
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    own["sha256"] = {
        name: hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()
        for name, array in arrays.items()
    }
    if damaged:
        own["sha256"]["params/fc8/kernel"] = "0" * 64
    own[OWN_CHECKSUM] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(metadata))
    (tmp_path / "10" / "checksums-0.json").unlink()
    if damaged:
        with raises_user_error("step 10: params/fc8/kernel failed the checksum"):
            Checkpoints(str(tmp_path)).restore(shapes_on(1))
    else:
        restored, _ = Checkpoints(str(tmp_path)).restore(shapes_on(1))
        np.testing.assert_array_equal(restored.params["fc8"]["kernel"], KERNEL)


def test_missing_checksums_of_a_process_are_damage(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step in (10, 20):
        checkpoints.save(state_on(1, step), None)
    checkpoints.close()
    shutil.move(tmp_path / "20" / "checksums-0.json", tmp_path / "20" / "checksums-1.json")
    assert int(Checkpoints(str(tmp_path)).restore(shapes_on(1))[0].step) == 10


def test_arrays_sharded_by_another_axis_are_refused():
    mesh = Mesh(np.array(jax.devices()[:4]), (AXIS,))
    array = jax.device_put(KERNEL, NamedSharding(mesh, P(None, AXIS)))
    with pytest.raises(ValueError, match="expected shards of its second last axis"):
        owned_parts({"kernel": array})
