"""The faults of `tests.mutants` fit the code as it is."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_that_a_mutant_changes_is_there_once(mutant):
    assert (ROOT / mutant.path).read_text().count(mutant.right) == 1
    assert mutant.right != mutant.wrong
    assert (ROOT / mutant.tests.split()[0]).exists()
