"""The variants of a product, small."""

import numpy as np
import pytest

from benchmarks import inference_variants


@pytest.mark.parametrize("name", [name for name in inference_variants.PRODUCTS if name.startswith("sum in")])
def test_parts_of_the_sum_give_the_product(name):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(4, 144)), random.normal(size=(144, 16))
    np.testing.assert_allclose(inference_variants.PRODUCTS[name](x, w), x @ w, rtol=1e-4, atol=1e-4)  # float32


def test_table_has_every_variant(capsys):
    inference_variants.report(inference_variants.products(4, 144, 16), rounds=1, of_each=1)
    _, _, first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("| one product |") and first.endswith("| 1.00 |")
    assert len(others) == len(inference_variants.PRODUCTS) - 1
