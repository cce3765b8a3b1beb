"""The tiles that csrc/cuda/pool_plan.cpp chooses for segment_pool on an H200."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass

import pytest

from tests.support.cuda_emulation import load

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the emulator is x86-64 code"),
    pytest.mark.emulated,
    pytest.mark.xdist_group("emulated"),  # one worker compiles
    pytest.mark.timeout(900),
]

H200 = (132, 228 << 10, 227 << 10)  # multiprocessors, shared memory of each, most of a block
WIDTHS = (128, 256, 512, 768, 1024, 1280, 1536, 2048, 3072, 3584, 4096, 5120, 8192)
ROWS = (750, 6_000, 100_000)
THREADS = 128


@dataclass(frozen=True)
class Plan:
    rows: int  # of a tile
    tiles: int
    staged: bool
    shared: int  # bytes of a block
    halo: int
    pitch: int  # bytes between rows
    cycles: float


def plan(size: int, rows: int, width: int, order: int, gpu: tuple[int, int, int] = H200) -> Plan:
    return Plan(*load().plan_pool(gpu, size, rows, width, order))


@pytest.mark.parametrize("order", [1, 2, 16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_plans_fit(size: int, order: int):
    for rows, width in itertools.product(ROWS, WIDTHS):
        found = plan(size, rows, width, order)
        assert found.tiles == -(-rows // found.rows)
        assert 1 <= found.rows <= THREADS - found.halo
        assert found.shared <= H200[2]
        if found.staged:
            assert found.pitch >= width * size and found.pitch % 16 == 0
            # Two rows apart are in different banks for half types.
            assert size > 2 or 2 * found.pitch % 128 == 64


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_cliffs(size: int, rows: int):
    """The modelled cost rises with the width and the order, and never jumps."""
    for order in (1, 2):
        for narrow, wide in itertools.pairwise(WIDTHS):
            a, b = plan(size, rows, narrow, order), plan(size, rows, wide, order)
            assert a.cycles <= b.cycles <= a.cycles * wide / narrow * 1.4, (narrow, wide, a, b)
    for width in WIDTHS:
        a, b = plan(size, rows, width, 1), plan(size, rows, width, 2)
        assert a.cycles <= b.cycles <= 1.5 * a.cycles, (width, a, b)


# Element size, rows, width, order, and what the tile must have: least rows, and whether it is staged.
TABLE = [
    (2, 100_000, 512, 1, 90, True),
    (2, 100_000, 768, 1, 60, True),
    (2, 100_000, 1024, 1, 40, True),
    (2, 100_000, 1280, 1, 30, True),
    (2, 100_000, 1280, 2, 30, True),
    (2, 100_000, 2048, 1, 18, True),
    (2, 100_000, 3584, 1, 10, True),
    (2, 100_000, 4096, 1, 16, True),
    (2, 100_000, 4096, 2, 16, True),
    (4, 100_000, 256, 1, 90, True),
    (4, 100_000, 512, 1, 40, True),
    (4, 100_000, 768, 1, 28, True),
    (4, 100_000, 1024, 1, 18, True),
    (4, 100_000, 1280, 1, 16, True),
    (4, 100_000, 1280, 2, 13, True),
    (4, 100_000, 2048, 1, 16, True),
    (8, 100_000, 512, 1, 18, True),
    (8, 100_000, 1024, 1, 16, True),
    (2, 750, 1280, 1, 4, True),
    (2, 750, 4096, 1, 4, True),
    (4, 750, 1280, 1, 4, True),
    (8, 750, 1280, 1, 4, True),
    (2, 24_000, 1280, 1, 25, True),
    (2, 24_000, 3584, 1, 10, True),
    (4, 24_000, 1280, 1, 13, True),
    (2, 100_000, 1280, 0, 90, False),  # Uniform reads rows once
    (4, 100_000, 1280, 0, 90, False),
    (2, 750, 1280, 0, 4, False),
    (8, 100_000, 4096, 1, 4, False),  # few rows fit, so the halo would be most of what is copied
    (8, 100_000, 8192, 1, 4, False),
    (4, 100_000, 8192, 1, 4, False),
]


@pytest.mark.parametrize(("size", "rows", "width", "order", "least", "staged"), TABLE)
def test_tiles(size: int, rows: int, width: int, order: int, least: int, staged: bool):
    found = plan(size, rows, width, order)
    assert (found.rows >= least, found.staged) == (True, staged), found


def test_short_batches_use_all_multiprocessors():
    for width in (256, 1280, 4096):
        assert plan(2, 750, width, 1).tiles >= 100


def test_other_gpus():
    """A GPU with little shared memory reads global memory instead of staging rows."""
    assert not plan(4, 1000, 64, 1, (4, 1 << 10, 1 << 10)).staged
    small, large = plan(2, 100_000, 1280, 1, (108, 164 << 10, 163 << 10)), plan(2, 100_000, 1280, 1)  # A100
    assert small.staged and small.rows <= large.rows and small.shared <= 163 << 10
