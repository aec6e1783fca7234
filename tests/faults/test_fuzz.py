"""A hundred rounds of tests/fuzz.py; `make fuzz` runs more."""

import os
from pathlib import Path

import pytest

from tests import fuzz
from tests.conftest import mostly_slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux' /proc")
@pytest.mark.parametrize("first", mostly_slow(range(0, 100, 25), 0))
def test_damaged_files_end_in_a_result_or_one_line(world, first):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory can't be reset here")
    found = fuzz.fuzz(world, seed=0, numbers=range(first, first + 25))
    assert not found, "\n".join(f"round {number}: {what}\n{wrong}" for number, (what, wrong) in found.items())
