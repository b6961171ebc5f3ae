"""The order of the examples and the alternating flips, as pure functions of the seed."""

import numpy as np

from vgg_jax.data.sampler import alternating_flips, balanced_indices, permutation, train_indices


def test_permutation_is_a_pure_function_of_seed_and_epoch():
    assert sorted(permutation(0, 0, 1000)) == list(range(1000))
    permutation.cache_clear()
    # Philox's raw bits never change, therefore this order does not either.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    orders = {tuple(permutation(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_epoch_takes_each_example_once_but_the_last_batch():
    taken = np.concatenate([train_indices(3, step, 32, 100) for step in range(3, 6)])
    assert len(set(taken)) == len(taken) == 96
    np.testing.assert_array_equal(taken, permutation(3, 1, 100)[:96])


def test_micro_batches_have_the_examples_of_the_batch():
    """100 examples make three batches of 30 or nine micro-batches of 10; a tenth would not complete a batch."""
    for step in range(7):
        micro_batches = [train_indices(3, 3 * step + i, 10, 100, accumulation_steps=3) for i in range(3)]
        np.testing.assert_array_equal(np.concatenate(micro_batches), train_indices(3, step, 30, 100))


def test_alternating_flips_flip_in_every_other_epoch():
    n, size = 100, 30
    seen = np.full((4, n), -1)
    for step in range(12):
        seen[step // 3, train_indices(0, step, size, n)] = alternating_flips(0, step, size, n)
    both = (seen[0] >= 0) & (seen[1] >= 0)
    assert both.sum() > 60
    assert (seen[0] + seen[1])[both].tolist() == [1] * both.sum()
    for epoch in (0, 1):
        again = (seen[epoch] >= 0) & (seen[epoch + 2] >= 0)
        np.testing.assert_array_equal(seen[epoch][again], seen[epoch + 2][again])
        assert 0.3 < seen[epoch][seen[epoch] >= 0].mean() < 0.7
    micro_batches = [alternating_flips(0, 3 * 4 + i, 10, n, accumulation_steps=3) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(micro_batches), alternating_flips(0, 4, 30, n))
    assert (alternating_flips(0, 0, size, n) != alternating_flips(1, 0, size, n)).any()


LABELS = np.array([0] * 37 + [1] * 9 + [3] * 4)  # class 2 has no images


def test_balanced_order_draws_each_class_equally_often():
    order = np.concatenate([balanced_indices(0, step, 10, LABELS) for step in range(15)])
    for epoch in order.reshape(3, 50):
        assert set(np.bincount(LABELS[epoch])) <= {0, 16, 17}
    counts = np.bincount(order, minlength=50)
    for label in (0, 1, 3):
        assert np.ptp(counts[label == LABELS]) <= 1  # the images of a class take turns


def test_balanced_order_depends_on_seed_and_step_only():
    draws = [balanced_indices(seed, step, 10, LABELS) for seed in (0, 1) for step in range(10)]
    assert len({tuple(draw) for draw in draws}) == 20
    np.testing.assert_array_equal(balanced_indices(1, 3, 10, LABELS), draws[13])


def test_balanced_order_of_more_classes_than_images_in_an_epoch():
    assert len(balanced_indices(0, 0, 3, np.arange(3))) == 3
