"""Distances, reductions, integrate-and-fire and packing have the bits of the definition.

Run by tests/triton/test_triton.py. By hand: ``TRITON_INTERPRET=1 pytest tests/triton/interpreted/segment_ops.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from fastcompress.reference import OPS as DEFINITION
from fastcompress.triton import OPS
from tests.support.sample_inputs import (
    DTYPES,
    FEATURES,
    TOKEN_ROWS,
    TOKENS,
    Batch,
    assert_same_bits,
    batches,
    features,
    packed,
    padded,
    strided,
)
from tests.support.slow import some
from tests.support.triton_interpreter import (
    QUICK,
    REDUCTIONS,
    SHORT,
    check,
    convert_float,
    given_segments,
    layout,
    layouts,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, for infinities


def test_round_trip_of_bfloat16():
    x = features("iid", 64, 9, torch.float32)
    x[0, :5] = torch.tensor([127.85, torch.inf, -0.0, 1e-40, 3.4e38])
    y = convert_float(x.numpy(), tl.float32, tl.bfloat16, None)
    assert_same_bits(torch.from_numpy(y.view(np.int16)).view(torch.bfloat16), x.bfloat16())
    back = convert_float(y, tl.bfloat16, tl.float32, None).view(np.float32)
    assert_same_bits(torch.from_numpy(back), x.bfloat16().float())


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_adjacent_distance(dtype: torch.dtype):
    for width in (1, 7, 31, 32, 64, 257):
        check("adjacent_distance", features("smooth", 40, width, dtype), None, None, 1, what=f"width {width}")
    for kind, lag in (*((kind, 1) for kind in FEATURES), ("iid", 3), ("iid", 1000)):
        batch = packed(kind, 33, dtype)
        check("adjacent_distance", batch.x, *layout(batch)[:2], lag, what=f"{batch}, lag {lag}")
    for batch in layouts(19, dtype):
        check("adjacent_distance", batch.x, *layout(batch)[:2], 1, what=str(batch))


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_min_variance_boundaries(dtype: torch.dtype):
    """In every layout, with row groups, equal costs and distances that are not finite; two blocks of a sequence."""
    for batch in layouts(19, dtype):
        check("banded_distance", batch.x, *layout(batch)[:2], 2, what=str(batch))
        d = DEFINITION["banded_distance"](batch.x, *layout(batch)[:2], 4)
        for rate, max_len in ((1.0, 1), (2.5, 4), (4.0, 5)):
            check("min_variance_boundaries", d, *layout(batch), rate, max_len, what=f"{batch}, {rate}, {max_len}")
    d = torch.rand(1520, 3, generator=torch.Generator().manual_seed(0), dtype=dtype).round(decimals=1)
    d[5, 0], d[7, 1], d[9, 2] = torch.nan, torch.inf, -torch.inf
    check("min_variance_boundaries", d, None, None, None, 4.0, 4)


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_greedy_boundaries(dtype: torch.dtype):
    x = features("smooth", 12, 2100, dtype)  # wider than a step
    same = [Batch(name, same, {}) for name, same in (("wide", x), ("no column", x[:, :0]), *strided(x[:, :20]))]
    ragged = [make(kind, 33, dtype, SHORT) for kind in ("nonfinite", "smooth") for make in (packed, padded)]
    for i, batch in enumerate((*same, *ragged)):
        check("greedy_boundaries", batch.x, *layout(batch)[:2], (0.3, 1.1)[i % 2], 4 * (i % 3), what=str(batch))


def check_gradient(batch: Batch, lag: int) -> None:
    grad = torch.randn(batch.x.shape[:-1], dtype=torch.float64 if batch.x.dtype == torch.float64 else torch.float32)
    check("adjacent_distance_backward", grad, batch.x, *layout(batch)[:2], lag, what=f"{batch}, lag {lag}")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_adjacent_distance_backward(dtype: torch.dtype):
    for i, kind in enumerate(FEATURES):
        check_gradient(packed(kind, 33, dtype, SHORT), 1 + 2 * (i % 2))
    for batch in (packed("iid", 70, dtype), padded("iid", 70, dtype, SHORT)):
        check_gradient(batch, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adjacent_distance_backward_in_every_layout(dtype: torch.dtype):
    for batch in (*batches(70, dtype), *(make(kind, 33, dtype) for kind in FEATURES for make in (packed, padded))):
        for lag in (1, 3):
            check_gradient(batch, lag)


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_reduce_and_expand(dtype: torch.dtype):
    starts, lengths, rows = given_segments()
    for kind in ("nonfinite", "zeros"):
        x, y = features(kind, rows, 37, dtype), features(kind, len(starts), 37, dtype, seed=1)
        x[::7] *= -0.0  # signs of zeros
        for reduce in REDUCTIONS if kind == "nonfinite" else ("mean", "max"):
            check("segment_reduce", x, starts, lengths, reduce, what=f"{kind}, {reduce}")
            if reduce != "max":
                check("segment_expand", y, starts, lengths, rows, reduce, what=f"{kind}, {reduce}")
        best = DEFINITION["segment_reduce"](x, starts, lengths, "max")
        check("segment_max_backward", y, x, best, starts, lengths, what=kind)
    none = torch.zeros(0, dtype=torch.int64)
    check("segment_reduce", x, none, none, "mean")
    check("segment_expand", y[:0], none, none, rows, "mean")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_weighted_mean(dtype: torch.dtype):
    starts, lengths, rows = given_segments()
    weights = torch.rand(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32) - 0.3
    weights[:3] = torch.tensor([0.0, 1.0, -1.0])  # sums of zero
    x, grad = features("nonfinite", rows, 37, dtype), features("iid", len(starts), 37, dtype, seed=1)
    check("segment_weighted_mean", x, weights, starts, lengths)
    y = DEFINITION["segment_weighted_mean"](x, weights, starts, lengths)
    check("segment_weighted_mean_backward", grad, x, y, weights, starts, lengths)


# Widths: less than a tile of columns, one tile with a tail, and several tiles.
@pytest.mark.parametrize(
    ("dtype", "width"),
    some(
        [(dtype, width) for dtype in DTYPES for width in (1, 37, 320)],
        (torch.float32, 1),
        (torch.float32, 320),
        (torch.bfloat16, 37),
    ),
    ids=str,
)
def test_integrate_rows(dtype: torch.dtype, width: int):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kind = "iid" if width == 320 else "nonfinite"
    x, grad = features(kind, TOKEN_ROWS, width, dtype), features("iid", len(TOKENS[0]), width, dtype, seed=1)
    weights = features("zeros", TOKEN_ROWS, 1, wide, seed=2)[:, 0]
    first, divisors = features("iid", len(TOKENS[0]), 2, wide, seed=3).T
    check("integrate_rows", x, weights, first, None, *TOKENS)
    check("integrate_rows", x, weights, first, divisors, *TOKENS)
    check("integrate_rows_backward", grad, x, weights, first, *TOKENS)
    none = torch.zeros(0, dtype=torch.int64)
    check("integrate_rows", x, weights, first[:0], None, none, none)
    check("integrate_rows_backward", grad[:0], x, weights, first[:0], none, none)


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_pack_rows(dtype: torch.dtype):
    index = torch.tensor([3, 0, -1, 9, 12, 10, 10, *range(13), -1] * 2)
    for width in (1, 24, 700):
        table, audio = features("iid", 10, width, dtype), features("nonfinite", 3, width, dtype)
        for rows, more in ((table, audio), (table, audio[:0]), (table[:0], audio)):
            inside = index[index < len(rows) + len(more)]
            for _, same in strided(rows) if len(rows) else [("", rows)]:
                check("pack_rows", same, more, inside, inside[:0], True, what=str(width))
        check("pack_rows", table, audio, index[:0], index[:0], False)


def test_pack_rows_of_wrong_numbers(monkeypatch):
    table, audio = torch.ones(4, 5), torch.ones(2, 5)
    index = torch.tensor([0, 6, -2, 2**62, -(2**63), 5])
    assert OPS["pack_rows"](table, audio, index, index, False)[:, 0].tolist() == [1, 0, 0, 0, 0, 1]
    monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
    with pytest.raises(RuntimeError, match="index must lie"):
        OPS["pack_rows"](table, audio, index, index, False)
