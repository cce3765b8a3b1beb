"""Every error names the argument and the value, and kernels never read or write out of bounds, whatever the input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.dispatch.library import COMPILED

OPS = torch.ops.fastcompress
RULE = fc.LocalMax().op_args()
LOW, HIGH = -(2**63), 2**63 - 1

X, Y = torch.randn(5, 3), torch.randn(2, 4, 3)  # packed, padded
D = torch.rand(5)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def segments(starts: Tensor, lengths: Tensor, rows: int = 5) -> fc.Segments:
    return fc.Segments(starts, lengths, ints(0, len(starts)).int(), ints(0, rows).int(), rows)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


GOOD = segments(ints(0, 2), ints(2, 3))
FIRED = fc.integrate_and_fire(X, D)

ERRORS: list[tuple[Callable, type[Exception], str]] = [
    # The input
    (lambda: fc.segment_pool([1.0]), TypeError, "x must be a tensor, got list"),
    (lambda: fc.segment_pool(X.int()), TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    (lambda: fc.segment_pool(X.cfloat()), TypeError, "got torch.complex64"),
    (lambda: fc.segment_pool(X[0]), ValueError, "x must have shape [N, D] or [B, T, D], got [3]"),
    (lambda: fc.segment_pool(Y[None]), ValueError, "x must have shape [N, D] or [B, T, D], got [1, 2, 4, 3]"),
    (lambda: fc.adjacent_distance(None), TypeError, "x must be a tensor, got NoneType"),
    (lambda: fc.adjacent_distance(X[0]), ValueError, "the input must have shape [N, D] or [B, T, D], got [3]"),
    (lambda: fc.adjacent_distance(X, lag=0), ValueError, "lag must be at least 1, got 0"),
    (lambda: fc.adjacent_distance(X, lag=1.0), TypeError, "lag must be an integer, got 1.0"),
    (lambda: fc.adjacent_distance(X, lag=True), TypeError, "lag must be an integer, got True"),
    (lambda: fc.select_boundaries(3, "local-max"), TypeError, "d must be a tensor, got int"),
    (lambda: fc.select_boundaries(D.bool(), "local-max"), TypeError, "got torch.bool"),
    (lambda: fc.select_boundaries(Y, "local-max"), ValueError, "the input must have shape [N] or [B, T], got [2, 4, 3]"),
    (lambda: fc.adjacent_distance(X.to_sparse()), TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: fc.segment_pool(X, row_group=X[:, 0].int().to_sparse()), TypeError, "row_group must be a dense tensor"),
    (lambda: fc.segments_from_ids(X[:, 0].int().to_sparse()), TypeError, "ids must be a dense tensor, got layout torch.sparse_coo"),
    (lambda: fc.row_groups(X[:, 0].int().to_sparse(), 3), TypeError, "input_ids must be a dense tensor"),
    (lambda: fc.segment_pool(X[:1].expand(2**31, 3)), ValueError, "the input must have fewer than 2**31 rows, the limit of int32 offsets, got 2147483648"),
    (lambda: fc.select_boundaries(D[:1].expand(2**20, 2**11), "uniform:2"), ValueError, "the input must have fewer than 2**31 rows"),
    (lambda: fc.row_groups(ints(1, 2), None), TypeError, "placeholder must be an integer, got None"),
    (lambda: fc.row_groups(ints(1, 2), 2**70), ValueError, f"placeholder must fit in 64 bits, got {2**70}"),
    (lambda: fc.pack(ints(1, 2), X, compact=D[:0]), TypeError, "compact must be True or False, got tensor([])"),
    (lambda: fc.row_groups(None, 3), TypeError, "input_ids must be a tensor, got NoneType"),
    (lambda: fc.quantity_loss(3, ints(1)), TypeError, "fired must be a result of integrate_and_fire, got int"),
    (lambda: fc.quantity_loss(FIRED, ints(1, 2)), ValueError, "target_lengths must have shape [1], got [2]"),
    (lambda: fc.quantity_loss(FIRED, D[:1]), TypeError, "target_lengths must be an int32 or int64 tensor, got torch.float32"),
    (lambda: fc.nn.ratio_loss(D, D[:4] > 0, 3.0), ValueError, "probability and boundary must have the same shape [N], got [5] and [4]"),
    (lambda: fc.nn.ratio_loss(D, D, 3.0), TypeError, "boundary must be bool, got torch.float32"),
    (lambda: fc.nn.ratio_loss(D, D > 0, 1.0), ValueError, "ratio must be more than 1 and finite, got 1.0"),
    (lambda: fc.nn.straight_through(None), TypeError, "probability must be a tensor, got NoneType"),
    (lambda: fc.nn.LearnedBoundary(8)(X), ValueError, "x must have shape [N, 8] or [B, T, 8], got [5, 3]"),
    (lambda: fc.nn.LearnedBoundary(8, ratio="3"), TypeError, "ratio must be a number, got '3'"),
    (lambda: fc.nn.IntegrateAndFire(8)(X), ValueError, "x must have shape [N, 8] or [B, T, 8], got [5, 3]"),
    (lambda: fc.nn.IntegrateAndFire(3)(X.int()), TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    (lambda: fc.nn.IntegrateAndFire(8, loss_weight=None), TypeError, "loss_weight must be a number, got None"),
    (lambda: fc.nn.GreedySegments(float("nan")), ValueError, "threshold must be a number, got nan"),
    (lambda: fc.greedy_segments(X, float("nan")), ValueError, "threshold must be a number, got nan"),
    (lambda: fc.nn.BipartiteMerge("2"), TypeError, "rate must be a number, got '2'"),
    (lambda: fc.nn.BipartiteMerge(2, window=-1), ValueError, "window must be at least 0, got -1"),
    (lambda: fc.nn.IterativeFusion(-1), ValueError, "count must be at least 1, got -1"),
    (lambda: fc.nn.GreedySegments(0.1, max_len=0), ValueError, "max_len must be at least 1, got 0"),
    (lambda: fc.nn.IntegrateAndFire(4, tail=5.0), ValueError, "tail must lie in [0, 1], got 5.0"),
    (lambda: fc.iterative_fusion(X, True), ValueError, "count must be an integer, got True"),
    (lambda: fc.bipartite_merge(X, 2.0, window=True), ValueError, "window must be an integer, got True"),
    (lambda: fc.greedy_segments(X, 0.1, max_len=True), ValueError, "max_len must be an integer, got True"),
    (lambda: fc.nn.NoveltyPool()(None), TypeError, "x must be a tensor, got NoneType"),
    (lambda: fc.nn.LearnedBoundary(3)(X, cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda: fc.nn.LearnedBoundary(3)(X, cu_seqlens=ints(0, 5)[None]), ValueError, "cu_seqlens must have shape [B + 1], got [1, 2]"),
    (lambda: fc.nn.LearnedBoundary(3)(X, cu_seqlens=ints(0, 9)), ValueError, "cu_seqlens must end at the number of rows, 5, got 9"),
    (lambda: fc.nn.LearnedBoundary(3)(Y, lengths=ints(4)), ValueError, "lengths must have shape [2], got [1]"),
    (lambda: fc.nn.IntegrateAndFire(3)(X, cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda: fc.Uniform(3).num_segments(-7), ValueError, "length must not be negative, got -7"),
    (lambda: fc.Uniform(3).num_segments("a"), TypeError, "length must be an integer or a tensor of integers, got 'a'"),
    (lambda: fc.TopK(rate=2).num_segments(None), TypeError, "length must be an integer or a tensor of integers, got None"),
    (lambda: fc.TopK(rate=2).num_segments(D), TypeError, "length must be an integer or a tensor of integers, got torch.float32"),
    (lambda: fc.Rule.from_string(None), TypeError, "text must be a string, got None"),
    (lambda: fc.Rule.from_dict(3), TypeError, "data must be a dict, got 3"),
    (lambda: fc.Rule.from_dict({"size": 3}), ValueError, "data must have a 'rule', one of uniform, local-max"),
    (lambda: GOOD.seconds("a"), TypeError, "frame_rate must be a number, got 'a'"),
    (lambda: fc.segments_from_starts(ints(1), 2.5), TypeError, "num_rows must be an integer, got 2.5"),
    (lambda: fc.segments_from_starts(ints(1), 2**63), ValueError, "num_rows must be less than 2**31"),
    # Numbers
    (lambda: fc.integrate_and_fire(X, D, beta="1"), TypeError, "beta must be a number, got '1'"),
    (lambda: fc.integrate_and_fire(X, D, tail=True), TypeError, "tail must be a number, got True"),
    (lambda: fc.bipartite_merge(X, D), TypeError, "rate must be a number, got tensor"),
    (lambda: fc.greedy_segments(X, None), TypeError, "threshold must be a number, got None"),
    # The rule
    (lambda: fc.segment_pool(X, rule=3), TypeError, "rule must be a fastcompress.Rule or a string, got int"),
    (lambda: fc.segment_pool(X, rule="mode"), ValueError, "unknown rule 'mode'"),
    (lambda: fc.select_boundaries(D, "uniform:0"), ValueError, "size must be at least 1, got 0"),
    (lambda: fc.nn.SegmentPool("local-max:order=x"), ValueError, "order must be an integer, got 'x'"),
    # Offsets and lengths, by shape
    (lambda: fc.segment_pool(Y, cu_seqlens=ints(0, 5)), ValueError, "cu_seqlens is for packed input; padded input [2, 4, 3]"),
    (lambda: fc.segment_pool(X, lengths=ints(5)), ValueError, "lengths is for padded input; packed input [5, 3]"),
    (lambda: fc.segment_pool(X, cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda: fc.segment_pool(Y, lengths=[4, 4]), TypeError, "lengths must be a tensor, got list"),
    (lambda: fc.segment_pool(X, cu_seqlens=ints(0, 5).float()), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    (lambda: fc.segment_pool(Y, lengths=ints(4, 4).short()), TypeError, "lengths must be int32 or int64, got torch.int16"),
    (lambda: fc.segment_pool(X, cu_seqlens=ints(0, 5)[None]), ValueError, "cu_seqlens must have shape [B + 1], got [1, 2]"),
    (lambda: fc.segment_pool(X, cu_seqlens=ints()), ValueError, "cu_seqlens must have shape [B + 1], got [0]"),
    (lambda: fc.segment_pool(Y, lengths=ints(4)), ValueError, "lengths must have shape [2], got [1]"),
    (lambda: fc.normalize_distance(D, cu_seqlens=ints(0, 9)), ValueError, "cu_seqlens must end at the number of rows, 5, got 9"),
    (lambda: fc.normalize_distance(D, cu_seqlens=ints(3, 1)), ValueError, "cu_seqlens must start at 0, got 3"),
    (lambda: fc.normalize_distance(D[None], lengths=ints(-4)), ValueError, "lengths must lie in [0, 5], the padded length, got -4"),
    # Row groups and masks
    (lambda: fc.segment_pool(X, row_group=ints(1).int()), ValueError, "row_group must have shape [5], got [1]"),
    (lambda: fc.segment_pool(Y, row_group=ints(1).int()), ValueError, "row_group must have shape [2, 4], got [1]"),
    (lambda: fc.segment_pool(X, row_group=D), TypeError, "row_group must be int32, got torch.float32"),
    (lambda: fc.segment_pool(X, row_group=ints(1, 1, 1, 1, 2**31)), TypeError, "row_group must be int32, got torch.int64"),
    (lambda: fc.segment_pool(X, row_group=[1] * 5), TypeError, "row_group must be a tensor, got list"),
    (lambda: fc.segment_pool(X, attention_mask=D), ValueError, "attention_mask is for padded input; packed input [5, 3]"),
    (lambda: fc.segment_pool(Y, attention_mask=D), ValueError, "attention_mask must have shape [2, 4], got [5]"),
    (lambda: fc.segment_pool(Y, attention_mask=[[1] * 4] * 2), TypeError, "attention_mask must be a tensor, got list"),
    (lambda: fc.segment_pool(Y, attention_mask=Y[..., 0], lengths=ints(4, 4)), ValueError, "attention_mask cannot be combined with lengths or row_group"),
    (lambda: fc.segment_pool(Y, attention_mask=Y[..., 0], row_group=Y[..., 0].int()), ValueError, "attention_mask cannot be combined with lengths or row_group"),
    # Keys, reductions, weights
    (lambda: fc.segment_pool(X, keys=3), TypeError, "keys must be a tensor, got int"),
    (lambda: fc.segment_pool(X, keys=X.int()), TypeError, "keys must be float32"),
    (lambda: fc.segment_pool(X, keys=X[:4]), ValueError, "keys must have shape [5, K], one row per row of x, got [4, 3]"),
    (lambda: fc.segment_pool(X, keys=D), ValueError, "keys must have shape [5, K], one row per row of x, got [5]"),
    (lambda: fc.segments_from_mask(torch.tensor(True)), ValueError, "mask must have shape [N] or [B, T], got []"),
    (lambda: fc.segments_from_ids(torch.tensor(3)), ValueError, "ids must have shape [N] or [B, T], got []"),
    (lambda: fc.segments_from_starts(ints(), -1), ValueError, "num_rows must not be negative, got -1"),
    (lambda: fc.nn.SegmentPool("local-max", "avg"), ValueError, "reduce must be one of mean, sum, max, first, last, middle, got 'avg'"),
    (lambda: fc.select_boundaries(D, "uniform:2").seconds(float("nan")), ValueError, "frame_rate must be a number, got nan"),
    (lambda: fc.segment_pool(X, reduce="median"), ValueError, "reduce must be one of mean, sum, max, first, last, middle, got 'median'"),
    (lambda: fc.segment_pool(X, weights=D, reduce="sum"), ValueError, "weights need reduce='mean', got reduce='sum'"),
    (lambda: fc.segment_pool(X, weights=[1.0]), TypeError, "weights must be a tensor, got list"),
    (lambda: fc.segment_pool(X, weights=D.int()), TypeError, "weights must be float32"),
    (lambda: fc.segment_pool(X, weights=D[:4]), ValueError, "weights must have shape [5], one value per row, got [4]"),
    # Segments
    (lambda: fc.segment_reduce(X, 3), TypeError, "segments must be fastcompress.Segments, got int"),
    (lambda: fc.segment_reduce(X[:4], GOOD), ValueError, "segments must have the rows of x, 4, got segments of 5 rows"),
    (lambda: fc.segment_reduce(X[0], GOOD), ValueError, "x must have shape [N, D] or [B, T, D], got [3]"),
    (lambda: fc.segment_reduce(X, GOOD, "mode"), ValueError, "reduce must be one of"),
    (lambda: fc.segment_expand(X, 3), TypeError, "segments must be fastcompress.Segments, got int"),
    (lambda: fc.segment_expand(X, GOOD), ValueError, "y must have shape [2, D], one row per segment, got [5, 3]"),
    (lambda: fc.segment_expand(X[0, :2], GOOD), ValueError, "y must have shape [2, D], one row per segment, got [2]"),
    (lambda: fc.segment_expand(X.int(), GOOD), TypeError, "y must be float32"),
    (lambda: fc.segment_expand(X[:2], segments(ints(0, 2), ints(2, 3), -1)), ValueError, "segments.num_rows must not be negative, got -1"),
    (lambda: fc.segment_reduce(X, segments(ints(0, 2), ints(2, 3), 5.0)), ValueError, "segments.num_rows must be an integer, got 5.0"),
    (lambda: GOOD.seconds(0), ValueError, "frame_rate must be positive, got 0"),
    (lambda: fc.segments_from_mask([True]), TypeError, "mask must be a tensor, got list"),
    (lambda: fc.segments_from_mask(D), TypeError, "mask must be bool or integer, got torch.float32"),
    (lambda: fc.segments_from_ids([1]), TypeError, "ids must be a tensor, got list"),
    (lambda: fc.segments_from_ids(D), TypeError, "ids must be integers, got torch.float32"),
    (lambda: fc.segments_from_ids(D.bool()), TypeError, "ids must be integers, got torch.bool"),
    (lambda: fc.segments_from_starts([1], 5), TypeError, "starts must be an int32 or int64 tensor, got list"),
    (lambda: fc.segments_from_starts(D, 5), TypeError, "starts must be an int32 or int64 tensor, got torch.float32"),
    (lambda: fc.segments_from_starts(ints(1)[None], 5), ValueError, "starts must have shape [S], got [1, 1]"),
    (lambda: fc.segments_from_starts(ints(1, -2), 5), ValueError, "starts must lie in [0, 5), the rows of the input, got -2"),
    (lambda: fc.segments_from_starts(ints(5, 1), 5), ValueError, "starts must lie in [0, 5), the rows of the input, got 5"),
    (lambda: fc.segments_from_starts(ints(1), 5, cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor, got list"),
    # Devices
    (lambda: fc.segment_pool(X, cu_seqlens=meta(ints(0, 5))), ValueError, "cu_seqlens must be on the device of the input, cpu, got meta"),
    (lambda: fc.segment_pool(Y, lengths=meta(ints(4, 4))), ValueError, "lengths must be on the device of the input, cpu, got meta"),
    (lambda: fc.segment_pool(X, row_group=meta(ints(*range(5)))), ValueError, "row_group must be on the device"),
    (lambda: fc.segment_pool(Y, attention_mask=meta(Y[..., 0])), ValueError, "attention_mask must be on the device"),
    (lambda: fc.segment_pool(X, keys=meta(X)), ValueError, "keys must be on the device"),
    (lambda: fc.segment_pool(X, weights=meta(D)), ValueError, "weights must be on the device"),
    (lambda: fc.segment_pool(meta(X), cu_seqlens=ints(0, 5)), ValueError, "cu_seqlens must be on the device of the input, meta, got cpu"),
    (lambda: fc.segment_reduce(meta(X), GOOD), ValueError, "segments.starts must be on the device of the input, meta, got cpu"),
    (lambda: fc.segment_expand(meta(X[:2]), GOOD), ValueError, "segments.starts must be on the device of the input, meta, got cpu"),
    (lambda: fc.segments_from_starts(meta(ints(1)), 5, cu_seqlens=ints(0, 5)), ValueError, "cu_seqlens must be on the device"),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, kind, message", ERRORS, ids=[f"{i}-{message[:40]}" for i, (*_, message) in enumerate(ERRORS)]
)
def test_error_names_argument_and_value(call: Callable, kind: type[Exception], message: str):
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


# Values that kernels check

OFFSETS = [
    ((1, 5), "cu_seqlens must start at 0, got 1"),
    ((-1, 5), "cu_seqlens must start at 0, got -1"),
    ((0, 4, 2, 5), "cu_seqlens must not decrease, got 4 and then 2 at index 2"),
    ((0, -1, 5), "cu_seqlens must not decrease, got 0 and then -1 at index 1"),
    ((0, 6), "cu_seqlens must end at the number of rows, 5, got 6"),
    ((0, 3), "cu_seqlens must end at the number of rows, 5, got 3"),
    ((0,), "cu_seqlens must end at the number of rows, 5, got 0"),
    ((0, HIGH, 5), f"cu_seqlens must not decrease, got {HIGH} and then 5 at index 2"),
    ((0, LOW, 5), f"cu_seqlens must not decrease, got 0 and then {LOW} at index 1"),
    ((LOW, 5), f"cu_seqlens must start at 0, got {LOW}"),
    ((0, 5, HIGH), f"cu_seqlens must end at the number of rows, 5, got {HIGH}"),
]
LENGTHS = [
    ((5, 4), "lengths must lie in [0, 4], the padded length, got 5 at index 0"),
    ((4, -1), "lengths must lie in [0, 4], the padded length, got -1 at index 1"),
    ((HIGH, 0), f"lengths must lie in [0, 4], the padded length, got {HIGH} at index 0"),
    ((0, LOW), f"lengths must lie in [0, 4], the padded length, got {LOW} at index 1"),
]
HOSTILE = [(X, "cu_seqlens", values, message) for values, message in OFFSETS]
HOSTILE += [(Y, "lengths", values, message) for values, message in LENGTHS]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("x, name, values, message", HOSTILE, ids=[f"{n}-{v}" for _, n, v, _ in HOSTILE])
def test_hostile_offsets_and_lengths(x: Tensor, name: str, values: tuple[int, ...], message: str, grad: bool):
    x = x.clone().requires_grad_(grad)
    layout = {name: ints(*values)}
    calls = [
        lambda: fc.segment_pool(x, **layout),
        lambda: fc.segment_pool(x, rule="local-max:prominence=0.1", **layout),
        lambda: fc.segment_pool(x, rule="uniform:2", compact=False, **layout),
        lambda: fc.adjacent_distance(x, **layout),
        lambda: fc.greedy_segments(x, 0.5, **layout),
        lambda: fc.select_boundaries(x[..., 0], "threshold:0.5", **layout),
        lambda: fc.segments_from_mask(x[..., 0] > 0, **layout),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)


LISTS = [
    ((0, 2), (2, -1), "segments.lengths must not be negative, got -1 at index 1"),
    ((0, 2), (3, 2), "segments.starts must not lie before the end of the previous segment, 3, got 2 at index 1"),
    ((3, 0), (2, 2), "segments.starts must not lie before the end of the previous segment, 5, got 0 at index 1"),
    ((-1,), (2,), "segments.starts must not lie before the end of the previous segment, 0, got -1 at index 0"),
    ((3,), (3,), "segments must lie inside the input's 5 rows, got start 3 and length 3 at index 0"),
    ((6,), (0,), "segments must lie inside the input's 5 rows, got start 6 and length 0 at index 0"),
    ((0,), (HIGH,), f"got start 0 and length {HIGH} at index 0"),
    ((1,), (HIGH,), f"got start 1 and length {HIGH} at index 0"),
    ((HIGH,), (HIGH,), f"got start {HIGH} and length {HIGH} at index 0"),
    ((LOW,), (1,), f"got {LOW} at index 0"),
    ((0,), (LOW,), f"segments.lengths must not be negative, got {LOW} at index 0"),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("starts, lengths, message", LISTS, ids=[f"{a}-{b}" for a, b, _ in LISTS])
def test_hostile_segments(starts: tuple[int, ...], lengths: tuple[int, ...], message: str, grad: bool):
    x = X.clone().requires_grad_(grad)
    hostile = segments(ints(*starts), ints(*lengths))
    calls = [
        lambda how=how: fc.segment_reduce(x, hostile, how) for how in ("mean", "sum", "max", "first", "last", "middle")
    ]
    calls += [lambda: fc.segment_reduce(x, hostile, weights=D), lambda: fc.segment_expand(x[: len(starts)], hostile)]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize("rows", [2**59, 2**60, 2**60 + 1, 2**63 - 1])
def test_more_rows_than_memory(rows: int):
    """Regression: the size of the output overflowed, and only 16 bytes were allocated."""
    y = torch.ones(1, 4)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RuntimeError, match="out of memory|overflow|alloc"):
            fc.segment_expand(y.to(dtype), segments(ints(0), ints(1), rows))


@pytest.mark.parametrize(
    "starts, lengths",
    [
        (ints(0, 2).int(), ints(2, 3).int()),
        (ints(0, 2), ints(2, 3).int()),
        (ints(0, 2).double(), ints(2, 3)),
        (ints(0, 2), ints(2, 3, 0)),
        (ints(0, 2), ints(2)),
        (ints(0, 2)[None], ints(2, 3)[None]),
        (torch.tensor(0), torch.tensor(2)),
    ],
    ids=lambda t: f"{list(t.shape)}-{t.dtype}",
)
def test_segments_of_a_wrong_dtype_or_shape(starts: Tensor, lengths: Tensor):
    hostile = fc.Segments(starts, lengths, ints(0, 2).int(), ints(0, 5).int(), 5)
    for reduce in ("mean", "first"):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            fc.segment_reduce(X, hostile, reduce)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        fc.segment_expand(X[:2], hostile)


# Direct calls of the ops, without the checks of the wrappers


def direct_calls() -> list[tuple[str, Callable]]:
    s, n, g = ints(0, 2), ints(2, 3), X[:2]
    cu, w = ints(0, 5), torch.ones(5)
    calls = {
        "pool rank 1": lambda: OPS.segment_pool(D, None, None, None, None, *RULE, True),
        "pool rank 4": lambda: OPS.segment_pool(Y[None], None, None, None, None, *RULE, True),
        "pool rank 0": lambda: OPS.segment_pool(D[0], None, None, None, None, *RULE, True),
        "pool integers": lambda: OPS.segment_pool(X.int(), None, None, None, None, *RULE, True),
        "pool complex": lambda: OPS.segment_pool(X.cfloat(), None, None, None, None, *RULE, True),
        "pool keys rows": lambda: OPS.segment_pool(X, X[:4], None, None, None, *RULE, True),
        "pool keys rank": lambda: OPS.segment_pool(X, D, None, None, None, *RULE, True),
        "pool keys dtype": lambda: OPS.segment_pool(X, X.double(), None, None, None, *RULE, True),
        "pool float offsets": lambda: OPS.segment_pool(X, None, cu.float(), None, None, *RULE, True),
        "pool offsets rank": lambda: OPS.segment_pool(X, None, cu[None], None, None, *RULE, True),
        "pool offsets rank 0": lambda: OPS.segment_pool(X, None, cu[1], None, None, *RULE, True),
        "pool no offsets": lambda: OPS.segment_pool(X, None, cu[:0], None, None, *RULE, True),
        "pool offsets of padded": lambda: OPS.segment_pool(Y, None, cu, None, None, *RULE, True),
        "pool lengths of packed": lambda: OPS.segment_pool(X, None, None, n, None, *RULE, True),
        "pool lengths shape": lambda: OPS.segment_pool(Y, None, None, cu[:1], None, *RULE, True),
        "pool group int64": lambda: OPS.segment_pool(X, None, None, None, torch.ones(5).long(), *RULE, True),
        "pool group size": lambda: OPS.segment_pool(X, None, None, None, torch.ones(4).int(), *RULE, True),
        "pool rule": lambda: OPS.segment_pool(X, None, None, None, None, "mode", *RULE[1:], True),
        "pool size": lambda: OPS.segment_pool(X, None, None, None, None, "uniform", 0, *RULE[2:], True),
        "pool prominence": lambda: OPS.segment_pool(
            X, None, None, None, None, *fc.LocalMax(1, None, 0.5).op_args(), True
        ),
        "pool min_len above max_len": lambda: OPS.segment_pool(
            X.repeat(9999, 1), None, None, None, None, "threshold", 1, torch.inf, 0.0, 10_000, 3, True, True
        ),
        "pool uniform lengths": lambda: OPS.segment_pool(
            X.repeat(9999, 1), None, None, None, None, "uniform", 10_000, -torch.inf, 0.0, 1, 1, True, True
        ),
        "select min_len above max_len": lambda: OPS.select_boundaries(
            D.repeat(9999), None, None, None, "threshold", 1, torch.inf, 0.0, 10_000, 3, True, False
        ),
        "distance rank": lambda: OPS.adjacent_distance(D, None, None, 1),
        "distance integers": lambda: OPS.adjacent_distance(X.int(), None, None, 1),
        "distance lag": lambda: OPS.adjacent_distance(X, None, None, 0),
        "distance backward shape": lambda: OPS.adjacent_distance_backward(D[:4], X, None, None, 1),
        "distance backward dtype": lambda: OPS.adjacent_distance_backward(D.half(), X, None, None, 1),
        "distance backward rank": lambda: OPS.adjacent_distance_backward(D, X.flatten(), None, None, 1),
        "distance backward lag": lambda: OPS.adjacent_distance_backward(D, X, None, None, -1),
        "greedy rank": lambda: OPS.greedy_boundaries(D, None, None, 0.5, 0),
        "greedy integers": lambda: OPS.greedy_boundaries(X.int(), None, None, 0.5, 0),
        "greedy offsets of padded": lambda: OPS.greedy_boundaries(Y, cu, None, 0.5, 0),
        "greedy max_len": lambda: OPS.greedy_boundaries(X, None, None, 0.5, -1),
        "select rank": lambda: OPS.select_boundaries(Y, None, None, None, *RULE, True),
        "select rank 0": lambda: OPS.select_boundaries(D[0], None, None, None, *RULE, True),
        "select rule": lambda: OPS.select_boundaries(D, None, None, None, "mode", *RULE[1:], True),
        "select min_len": lambda: OPS.select_boundaries(D, None, None, None, *RULE[:4], 0, *RULE[5:], True),
        "reduce rank": lambda: OPS.segment_reduce(Y, s, n, "mean"),
        "reduce name": lambda: OPS.segment_reduce(X, s, n, "mode"),
        "reduce integers": lambda: OPS.segment_reduce(X.int(), s, n, "mean"),
        "reduce int32": lambda: OPS.segment_reduce(X, s.int(), n.int(), "mean"),
        "reduce lists": lambda: OPS.segment_reduce(X, s, n[:1], "mean"),
        "expand rank": lambda: OPS.segment_expand(D[:2], s, n, 5, "sum"),
        "expand rows": lambda: OPS.segment_expand(X, s, n, 5, "sum"),
        "expand negative": lambda: OPS.segment_expand(g[:0], s[:0], n[:0], -1, "sum"),
        "expand max": lambda: OPS.segment_expand(g, s, n, 5, "max"),
        "expand outside": lambda: OPS.segment_expand(g, s, n, 4, "sum"),
        "max backward grad": lambda: OPS.segment_max_backward(X, X, g, s, n),
        "max backward y": lambda: OPS.segment_max_backward(g, X, g[:, :2], s, n),
        "max backward dtype": lambda: OPS.segment_max_backward(g.half(), X, g, s, n),
        "max backward rank": lambda: OPS.segment_max_backward(g, D, g, s, n),
        "weighted shape": lambda: OPS.segment_weighted_mean(X, w[:4], s, n),
        "weighted rank": lambda: OPS.segment_weighted_mean(X, w[:, None], s, n),
        "weighted dtype": lambda: OPS.segment_weighted_mean(X, w.double(), s, n),
        "weighted backward grad": lambda: OPS.segment_weighted_mean_backward(X, X, g, w, s, n),
        "weighted backward y": lambda: OPS.segment_weighted_mean_backward(g, X, X, w, s, n),
        "weighted backward weights": lambda: OPS.segment_weighted_mean_backward(g, X, g, w[:1], s, n),
        "integrate rank": lambda: OPS.integrate_rows(Y, w, w[:2], None, s, n),
        "integrate weights": lambda: OPS.integrate_rows(X, w[:4], w[:2], None, s, n),
        "integrate dtype": lambda: OPS.integrate_rows(X, w.double(), w[:2], None, s, n),
        "integrate first": lambda: OPS.integrate_rows(X, w, w[:3], None, s, n),
        "integrate divisors": lambda: OPS.integrate_rows(X, w, w[:2], w, s, n),
        "integrate int32": lambda: OPS.integrate_rows(X, w, w[:2], None, s.int(), n.int()),
        "integrate lists": lambda: OPS.integrate_rows(X, w, w[:2], None, s, n[:1]),
        "integrate empty": lambda: OPS.integrate_rows(X, w, w[:2], None, s, ints(2, 0)),
        "integrate two rows shared": lambda: OPS.integrate_rows(X, w, w[:2], None, ints(0, 1), ints(3, 2)),
        "integrate outside": lambda: OPS.integrate_rows(X, w, w[:2], None, s, ints(2, 4)),
        "integrate negative": lambda: OPS.integrate_rows(X, w, w[:2], None, ints(-1, 2), n),
        "integrate backward grad": lambda: OPS.integrate_rows_backward(X, X, w, w[:2], s, n),
        "integrate backward dtype": lambda: OPS.integrate_rows_backward(g.half(), X, w, w[:2], s, n),
        "integrate backward outside": lambda: OPS.integrate_rows_backward(g, X, w, w[:2], s, ints(2, 4)),
    }
    return list(calls.items())


@pytest.mark.skipif(not COMPILED, reason="no compiled library")
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in direct_calls()])
def test_ops_refuse_what_the_checks_would_have(call: Callable):
    with pytest.raises(RuntimeError):
        call()
