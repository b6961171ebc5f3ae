"""The order of the examples: pure functions of the seed, the same on every machine."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of the examples in an epoch: a pure function, the same on every machine and NumPy version."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(bits, kind="stable")
    order.setflags(write=False)  # it is shared by whoever asks again
    return order


def train_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """The examples of a training step's batch. An epoch leaves out its last, incomplete batch."""
    epoch, i = divmod(step, num_examples // batch_size)
    return permutation(seed, epoch, num_examples)[i * batch_size : (i + 1) * batch_size]
