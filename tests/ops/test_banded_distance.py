"""``banded_distance``: its columns are those of ``adjacent_distance``, bit for bit, on every backend."""

from __future__ import annotations

import pytest
import torch

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from tests.support.sample_inputs import DTYPES, assert_same_bits, batches, features, strided

op = torch.ops.fastcompress.banded_distance


# Windows: fewer and more lags than one step of each instruction set multiplies, and more than most sequences have.
@pytest.mark.parametrize("window", (1, 3, 7, 20))
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_adjacent_distances(dtype: torch.dtype, window: int):
    for kind in ("smooth", "zeros", "nonfinite"):
        for batch in batches(37, dtype, kind):
            layout = {name: batch.layout.get(name) for name in ("cu_seqlens", "lengths")}
            found = fc.banded_distance(batch.x, window, **layout)
            assert found.shape == (*batch.x.shape[:-1], window)
            for lag in range(1, window + 1):
                assert_same_bits(found[..., lag - 1], fc.adjacent_distance(batch.x, lag=lag, **layout), str(batch))
            assert_same_bits(found, DEFINITION["banded_distance"](batch.x, *layout.values(), window), str(batch))


@pytest.mark.parametrize("width", (1, 31, 32, 96, 200))
def test_widths_and_strides(width: int):
    for dtype in DTYPES:
        for what, x in strided(features("smooth", 150, width, dtype)):
            assert_same_bits(fc.banded_distance(x, 7), DEFINITION["banded_distance"](x, None, None, 7), what)


def test_no_gradient_and_errors():
    x = torch.ones(4, 2, requires_grad=True)
    assert not fc.banded_distance(x, 2).requires_grad
    for window in (0, True, 2.5):
        with pytest.raises(ValueError, match="window must be"):
            fc.banded_distance(x, window)
    with pytest.raises((RuntimeError, ValueError), match="window must be at least 1, got 0"):
        op(x.detach(), None, None, 0)
    assert fc.banded_distance(torch.ones(0, 2), 3).shape == (0, 3)
