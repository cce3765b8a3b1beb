"""The Triton ops against the definition, bit for bit, in Triton's interpreter: no GPU needed.

The interpreter is chosen when triton is imported, for the whole process, so ``tests/triton/test_triton.py`` runs the
tests of this file in processes of their own. By hand: ``TRITON_INTERPRET=1 pytest tests/triton/interpreted.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from fastcompress.rules import max_segments
from fastcompress.triton import OPS, common, tiles
from fastcompress.triton.segment_reduce import segment_grid, segment_tile
from tests.support.sample_inputs import (
    DTYPES,
    FEATURES,
    RULES,
    TOKEN_ROWS,
    TOKENS,
    Batch,
    assert_same_bits,
    batches,
    expanded,
    features,
    offsets,
    packed,
    padded,
    row_groups,
    strided,
)
from tests.support.slow import some

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of arithmetic with infinities

FUSED = (
    fc.Uniform(1),
    fc.Uniform(3),
    fc.Uniform(3, tail="drop"),
    fc.Uniform(100),
    fc.Threshold(0.15),
    fc.LocalMax(),
    fc.LocalMax(order=2, threshold=0.3),
    fc.LocalMax(order=3),
    fc.LocalMax(order=16),
)
SHORT = (0, 1, 2, 3, 17, 5)
# The interpreter takes its time.
QUICK = some(DTYPES, torch.float32, torch.bfloat16)
TILED = some(FUSED, fc.Uniform(3, tail="drop"), fc.Threshold(0.15), fc.LocalMax(order=16))
REDUCTIONS = ("mean", "sum", "max", "first", "last", "middle")


def _convert_float(x, source, target, rounding, convert=interpreter._convert_float):
    """Between fp32 and bf16 as hardware does: the interpreter keeps bf16 as 16 bits and drops the rest unrounded."""
    if source == tl.bfloat16 and target == tl.float32:
        return (x.view(np.uint16).astype(np.uint32) << 16).reshape(x.shape)
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(x).view(np.uint32)
        to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        is_nan = bits & 0x7FFFFFFF > 0x7F800000
        return np.where(is_nan, 0x7FC0, to_even).astype(np.uint16).reshape(x.shape)
    return convert(x, source, target, rounding)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)


def check(name: str, *args, what: str = "") -> None:
    """The op and its definition return the same bits."""
    actual, expected = OPS[name](*args), DEFINITION[name](*args)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (a, b) in reversed(list(enumerate(zip(actual, expected, strict=True)))):
        assert_same_bits(a, b, f"{what}: {name}, result {i}")


def layout(batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """cu_seqlens, lengths and row groups, as the ops take them."""
    group = batch.layout.get("row_group")
    if "attention_mask" in batch.layout:
        group = torch.where(batch.layout["attention_mask"].bool(), 1, -1).int()
    return batch.layout.get("cu_seqlens"), batch.layout.get("lengths"), group


def layouts(width: int, dtype: torch.dtype, kind: str = "smooth") -> Iterator[Batch]:
    """Every layout of ``batches``, the padded one with less padding: the interpreter takes its time for every row."""
    for batch in batches(width, dtype, kind):
        yield padded(kind, width, dtype, SHORT) if batch.x.dim() == 3 and batch.x.shape[1] > 60 else batch


def given_segments() -> tuple[Tensor, Tensor, int]:
    """Starts, lengths and rows: short, empty and long segments, longer than one and two blocks of a sum, with gaps."""
    lengths = torch.tensor([1, 2, 0, 3, 64, 65, 130, 5, 0, 20, 0])
    gaps = torch.tensor([0, 0, 0, 0, 3, 0, 0, 9, 0, 0, 4])
    starts = (lengths + gaps).cumsum(0) - lengths
    return starts, lengths, int(starts[-1]) + 2


def test_round_trip_of_bfloat16():
    x = features("iid", 64, 9, torch.float32)
    x[0, :5] = torch.tensor([127.85, torch.inf, -0.0, 1e-40, 3.4e38])
    y = _convert_float(x.numpy(), tl.float32, tl.bfloat16, None)
    assert_same_bits(torch.from_numpy(y.view(np.int16)).view(torch.bfloat16), x.bfloat16())
    back = _convert_float(y, tl.bfloat16, tl.float32, None).view(np.float32)
    assert_same_bits(torch.from_numpy(back), x.bfloat16().float())


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_adjacent_distance(dtype: torch.dtype):
    for width in (1, 7, 31, 32, 64, 257):
        check("adjacent_distance", features("smooth", 40, width, dtype), None, None, 1, what=f"width {width}")
    for kind in FEATURES:
        batch = packed(kind, 33, dtype)
        for lag in (1, 3, 1000):
            check("adjacent_distance", batch.x, *layout(batch)[:2], lag, what=f"{batch}, lag {lag}")
    for batch in layouts(19, dtype):
        check("adjacent_distance", batch.x, *layout(batch)[:2], 1, what=str(batch))


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
        for reduce in REDUCTIONS:
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


@pytest.mark.parametrize("width", (1, 37, 320))
@pytest.mark.parametrize("dtype", QUICK, ids=str)
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


def check_selection(batch: Batch, dtype: torch.dtype, rules: tuple[fc.Rule, ...], compact: bool) -> None:
    d = (batch.x[..., 0] * 0.3 + 0.5).to(dtype)
    for rule in rules:
        args = *layout(batch), *rule.op_args(), compact
        check("select_boundaries", d, *args, what=f"{batch}, {rule}, compact={compact}")


# The last differs from 1 in fp64 alone.
SELECTED = (*RULES, fc.LocalMax(order=3), fc.LocalMax(threshold=0.9999999999))


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_select_boundaries(dtype: torch.dtype):
    names = ("packed", "grouped") if dtype == torch.float32 else ("padded-iid", "grouped-padded")
    for i, batch in enumerate(b for b in layouts(5, torch.float64, "iid") if b.name.startswith(names)):
        check_selection(batch, dtype, SELECTED[i % 2 :: 2] if dtype != torch.float32 else SELECTED, i % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_boundaries_in_every_layout(dtype: torch.dtype):
    for batch in batches(5, torch.float64, "iid"):
        for compact in (True, False):
            check_selection(batch, dtype, SELECTED, compact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_pool_in_every_layout_by_every_rule(dtype: torch.dtype):
    for batch in batches(33, dtype):
        for rule in RULES:
            for compact in (True, False):
                args = None, *layout(batch), *rule.op_args(), compact
                check("segment_pool", batch.x, *args, what=f"{batch}, {rule}, compact={compact}")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_segment_pool(dtype: torch.dtype):
    compact = False
    for batch in layouts(17, dtype):
        for rule in (fc.Uniform(3, tail="drop"), fc.LocalMax(), fc.LocalMax(order=2, min_len=2, max_len=5)):
            args = None, *layout(batch), *rule.op_args(), compact
            check("segment_pool", batch.x, *args, what=f"{batch}, {rule}, compact={compact}")
            compact = not compact
    for kind in FEATURES:
        batch = packed(kind, 33, dtype)
        check("segment_pool", batch.x, None, *layout(batch), *fc.LocalMax().op_args(), True, what=str(batch))


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


def run_lengths(kind: str) -> Tensor:
    """Frames of runs of equal rows: tiles whose last segment goes on, and on past whole tiles and blocks of a sum."""
    if kind == "long":
        return torch.tensor([3, 190, 1, 1, 130, 64, 65, 2])
    return torch.tensor([1, 2, 3, 4] * 50)


@pytest.mark.parametrize("rule", TILED, ids=str)
def test_tiles(rule: fc.Rule):
    window = tiles.scored_window(*rule.op_args()[:2], torch.float32)
    for kind in ("long", "short"):
        lengths = run_lengths(kind)
        x = features("iid", len(lengths), 9, torch.float32).repeat_interleave(lengths, 0)
        assert len(x) > 3 * window.owned
        x += torch.randn(x.shape) * 1e-3 * (kind == "short")
        groups = row_groups(len(x)).repeat_interleave(3)[: len(x)]
        cu = offsets((200, 0, 1, len(x) - 201))
        for name, args in {"one": (None, None, None), "some": (cu, None, None), "groups": (cu, None, groups)}.items():
            compact = (name == "groups") == (kind == "long")
            what = f"{kind}, {name}, compact={compact}"
            check("segment_pool", x, None, *args, *rule.op_args(), compact, what=what)


def test_a_run_of_one_group_from_far_before_the_tile():
    x = features("iid", 700, 3, torch.float32)
    groups = torch.full((700,), 2, dtype=torch.int32)
    groups[5] = 3
    for rule in (fc.Uniform(7), fc.Uniform(7, tail="drop"), fc.Uniform(500), fc.Uniform(500, tail="drop")):
        check("segment_pool", x, None, None, None, groups, *rule.op_args(), True, what=str(rule))


@pytest.mark.parametrize("size", [39, 40, 41, 2**63 - 1])
def test_sizes_and_orders_beyond_all_rows(size: int):
    x = features("iid", 40, 3, torch.float32)
    d = DEFINITION["adjacent_distance"](x, None, None, 1)
    for rule in (fc.Uniform(size), fc.Uniform(size, tail="drop"), fc.LocalMax(order=size)):
        check("segment_pool", x, None, None, None, None, *rule.op_args(), False, what=str(rule))
        check("select_boundaries", d, None, None, None, *rule.op_args(), False, what=str(rule))


def test_limits_over_tiles():
    lengths = run_lengths("long")[:5]
    x = features("iid", len(lengths), 9, torch.float32).repeat_interleave(lengths, 0)
    for rule in (
        fc.Threshold(0.1, min_len=150),
        fc.Threshold(0.1, max_len=140),
        fc.LocalMax(order=400),
        fc.LocalMax(prominence=0.01),
    ):
        check("segment_pool", x, None, None, None, None, *rule.op_args(), True, what=str(rule))


@pytest.mark.parametrize("key_dtype", QUICK, ids=str)
def test_keys_are_scored_and_x_is_pooled(key_dtype: torch.dtype):
    for dtype in DTYPES:
        for batch in (packed("iid", 33, dtype, SHORT), padded("iid", 33, dtype, SHORT)):
            keys = features("iid", batch.x[..., 0].numel(), 48, key_dtype, seed=2).view(*batch.x.shape[:-1], 48)
            for rule in (fc.LocalMax(), fc.Threshold(0.9, min_len=2)):
                args = batch.x, keys, *layout(batch), *rule.op_args(), True
                check("segment_pool", *args, what=f"{batch}, {rule}")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype):
    for batch in (packed("smooth", 20, dtype, SHORT), padded("smooth", 20, dtype, SHORT)):
        for name, x in strided(batch.x):
            args = *layout(batch), *fc.LocalMax().op_args(), True
            check("segment_pool", x, None, *args, what=f"{batch}, {name}")
            check("adjacent_distance", x, *layout(batch)[:2], 1, what=f"{batch}, {name}")
    for name, x in expanded(40, 20, dtype):
        check("segment_pool", x, None, None, None, None, *fc.Threshold(0.1).op_args(), True, what=name)
        starts, lengths = torch.tensor([0, 10]), torch.tensor([10, 20])
        check("segment_reduce", x, starts, lengths, "mean", what=name)
        check("segment_expand", x[:2], starts, lengths, 40, "mean", what=name)


HOSTILE = ([0, 99], [1, 40], [0, 30, 20, 40], [0, -5, 40], [0, 2**31 - 1, 40], [-(2**31), 40], [0, 39], [7])


@pytest.mark.parametrize("values", HOSTILE, ids=str)
def test_hostile_offsets(values: list[int]):
    """An error that names the argument where the count is read; else one sequence of all rows and no wild access."""
    x = torch.full((140, 8), torch.nan)
    x[50:90] = features("iid", 40, 8, torch.float32)
    x, cu = x[50:90], torch.tensor(values, dtype=torch.int32)
    sequences = len(values) - 1
    for rule in (fc.LocalMax(), fc.Uniform(3), fc.Threshold(0.5, min_len=2)):
        args = rule.op_args()
        with pytest.raises(ValueError, match="cu_seqlens must"):
            OPS["segment_pool"](x, None, cu, None, None, *args, True)
        with pytest.raises(ValueError, match="cu_seqlens must"):
            OPS["select_boundaries"](x[:, 0].contiguous(), cu, None, None, *args, True)
        pooled = OPS["segment_pool"](x, None, cu, None, None, *args, False)
        name, size, _, _, min_len, max_len, _ = args
        assert len(pooled[0]) == max_segments(name, size, min_len, max_len, 40, sequences)
        if sequences:
            one = offsets((40,) + (0,) * (sequences - 1))
            expected = DEFINITION["segment_pool"](x, None, one, None, None, *args, False)
            for a, b in zip(pooled, expected, strict=True):
                assert_same_bits(a, b, str(rule))
    if sequences:
        assert_same_bits(OPS["greedy_boundaries"](x, cu, None, 0.9, 0), OPS["greedy_boundaries"](x, None, None, 0.9, 0))
        one = DEFINITION["adjacent_distance"](x, None, None, 1)
        assert_same_bits(OPS["adjacent_distance"](x, cu, None, 1), one)
    assert OPS["adjacent_distance_backward"](torch.ones(40), x, cu, None, 1).isfinite().all()


@pytest.mark.parametrize("values", [[-1, 3], [4, 21], [2**31 - 1, 0], [-(2**31), 20]], ids=str)
def test_hostile_lengths(values: list[int]):
    x, lengths = features("iid", 40, 8, torch.float32).view(2, 20, 8), torch.tensor(values, dtype=torch.int32)
    for rule in (fc.LocalMax(), fc.Uniform(3)):
        with pytest.raises(ValueError, match="lengths must lie in"):
            OPS["segment_pool"](x, None, None, lengths, None, *rule.op_args(), True)
        pooled = OPS["segment_pool"](x, None, None, lengths, None, *rule.op_args(), False)
        expected = DEFINITION["segment_pool"](x.view(40, 8), None, offsets((40, 0)), None, None, *rule.op_args(), False)
        for a, b in zip(pooled, expected, strict=True):
            assert_same_bits(a, b, str(rule))


def test_hostile_segments():
    x = torch.full((100, 8), torch.nan)
    x[40:60] = 1.0
    x = x[40:60]
    starts = torch.tensor([-7, 3, 2**62, 19, -(2**63), 0])
    lengths = torch.tensor([5, 2**62, 4, 9, -1, 20])
    for reduce in REDUCTIONS:
        assert (OPS["segment_reduce"](x, starts, lengths, reduce).isfinite()).all()
        if reduce != "max":
            OPS["segment_expand"](torch.ones(6, 8), starts, lengths, 20, reduce)
    weights = torch.ones(20)
    OPS["segment_weighted_mean_backward"](torch.ones(6, 8), x, torch.ones(6, 8), weights, starts, lengths)
    OPS["segment_max_backward"](torch.ones(6, 8), x, torch.ones(6, 8), starts, lengths)
    assert OPS["integrate_rows"](x, weights, torch.ones(6), None, starts, lengths).isfinite().all()
    for found in OPS["integrate_rows_backward"](torch.ones(6, 8), x, weights, torch.ones(6), starts, lengths):
        assert found.isfinite().all()


def test_values_are_checked_at_once_if_asked(monkeypatch):
    monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
    x, cu = torch.ones(20, 8), torch.tensor([0, 30])
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        OPS["adjacent_distance"](x, cu, None, 1)
    with pytest.raises(ValueError, match="must lie inside"):
        OPS["segment_reduce"](x, torch.tensor([0]), torch.tensor([21]), "mean")
    with pytest.raises(ValueError, match="must lie inside"):
        OPS["integrate_rows"](x, torch.ones(20), torch.ones(1), None, torch.tensor([0]), torch.tensor([21]))


def test_launches(monkeypatch):
    """How many kernels an op launches, and that nothing is read from the device without ``compact``."""
    names = []
    options = common.compile_options
    monkeypatch.setattr(common, "compile_options", lambda *args: names.append(1) or options(*args))
    monkeypatch.setattr(common.Sequences, "read_total", lambda self: pytest.fail("reads from the device"))
    batch = packed("iid", 8, torch.float32)
    cu = batch.layout["cu_seqlens"]

    def launches(name: str, *args) -> int:
        names.clear()
        OPS[name](*args)
        return len(names)

    for rule in FUSED:
        assert launches("segment_pool", batch.x, None, cu, None, None, *rule.op_args(), False) == 2, rule
    for rule, more in ((fc.LocalMax(order=17), 0), (fc.LocalMax(prominence=0.1), 0), (fc.Threshold(0.1, min_len=2), 1)):
        assert launches("segment_pool", batch.x, None, cu, None, None, *rule.op_args(), False) == 5 + more, rule
        d = batch.x[:, 0].contiguous()
        assert launches("select_boundaries", d, cu, None, None, *rule.op_args(), False) == 3 + more, rule
    assert launches("adjacent_distance", batch.x, cu, None, 1) == 2
    assert launches("greedy_boundaries", batch.x, cu, None, 0.3, 0) == 3
    starts, lengths, rows = given_segments()
    assert launches("segment_reduce", features("iid", rows, 8, torch.float32), starts, lengths, "mean") == 1
    assert launches("segment_expand", torch.ones(len(starts), 8), starts, lengths, rows, "mean") == 1


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rule", [fc.LocalMax(), fc.LocalMax(min_len=2), fc.Uniform(1)], ids=str)
def test_results_are_what_the_fakes_say(rule: fc.Rule, compact: bool):
    """No aliases, and the strides and offsets of fresh tensors; with an odd upper bound of the segments too."""
    x = packed("iid", 5, torch.float32, (4, 0, 10)).x
    cu, d = offsets((4, 0, 10)), x[:, 0].contiguous()
    with fc.backend("triton"):
        for name, args in (("segment_pool", (x, None)), ("select_boundaries", (d,))):
            op = getattr(torch.ops.fastcompress, name).default
            args = *args, cu, None, None, *rule.op_args(), compact
            if not compact:
                starts, lengths = op(*args)[-3:-1]
                assert starts.storage_offset() == lengths.storage_offset() == 0
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_the_default_device_does_not_matter():
    """Neither for the numbers that are passed as bits, which a tensor on that device would wait for."""
    x = features("iid", 20, 5, torch.float32)
    for rule in (fc.Threshold(0.7312), fc.LocalMax(prominence=0.1)):
        expected = DEFINITION["segment_pool"](x, None, None, None, None, *rule.op_args(), False)
        with torch.device("meta"):
            actual = OPS["segment_pool"](x, None, None, None, None, *rule.op_args(), False)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b, str(rule))


@pytest.mark.parametrize("value", [0.1, 1e-320, torch.inf, -torch.inf, 0.9999999999])
def test_bits_of_numbers(value: float):
    for dtype in (torch.float32, torch.float64):
        wanted = torch.tensor(value, dtype=dtype).double().view(torch.int64).item()
        assert tiles.rounded_threshold(value, dtype) == wanted
    assert common.double_bits(value) == torch.tensor(value, dtype=torch.float64).view(torch.int64).item()


def test_rows_that_are_too_wide():
    """As many programs side by side as they need cannot be launched."""
    x, starts = torch.zeros(1, 2**21 + 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rows must not be wider than 2097152, got 2097153"):
        OPS["segment_reduce"](x, starts, starts + 1, "mean")
    with pytest.raises(RuntimeError, match="rows must not be wider than 2097152, got 2097153"):
        OPS["segment_max_backward"](x, x, x, starts, starts + 1)
    assert segment_grid(1, 2**21, segment_tile(2**21, torch.float64))[1] <= 65_535


@pytest.mark.parametrize("runs, kept", [(3, 3), (30, 41)])
def test_few_segments_do_not_hold_the_memory_of_many(runs: int, kept: int):
    """Of 41 segments at most, less than half are few."""
    x = features("iid", runs, 4, torch.float32)[torch.arange(40) * runs // 40]
    args = None, None, None, *fc.Threshold(1e-4).op_args(), True
    d = DEFINITION["adjacent_distance"](x, None, None, 1)
    for results in (OPS["segment_pool"](x, None, *args), OPS["select_boundaries"](d, *args)):
        for tensor in results[:-1]:
            rows = tensor.untyped_storage().nbytes() // (tensor.element_size() * tensor[0].numel())
            assert (len(tensor), rows) == (runs, kept)
