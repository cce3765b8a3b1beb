"""``segment_pool`` has the bits of its three steps and of the definition, for all layouts, chunks and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.ops.segment_reduce import REDUCTIONS
from fastcompress.reference import OPS
from fastcompress.rules import max_segments
from tests.support.sample_inputs import (
    DTYPES,
    DTYPES_AND_RULES,
    FEW_RULES,
    RAGGED,
    RULES,
    WIDTHS_AND_FEATURES,
    Batch,
    assert_same_bits,
    batches,
    features,
    offsets,
    packed,
    padded,
    strided,
)

EDGE = 1024  # rows per chunk, where a row has 256 bytes (csrc/cpu/segment_pool.cpp: 256 KiB)
ROWS = 24 * EDGE  # 6 MB: enough for several threads


def composed(x: Tensor, rule: fc.Rule, *, keys=None, reduce="mean", weights=None, compact=True, **layout) -> fc.Pooled:
    """Return the result of the three steps, called one after another."""
    sequences = {name: layout[name] for name in ("cu_seqlens", "lengths") if name in layout}
    d = fc.adjacent_distance(x if keys is None else keys, **sequences)
    segments = fc.select_boundaries(d, rule, compact=compact, **layout)
    return fc.Pooled(fc.segment_reduce(x, segments, reduce, weights), segments)


def definition(x: Tensor, rule: fc.Rule, *, keys=None, compact=True, **layout) -> tuple[Tensor, ...]:
    """Return values, starts, lengths and cu_segments of the reference."""
    group = layout.get("row_group")
    if "attention_mask" in layout:
        group = layout["attention_mask"].int() - 1
        group[group == 0] = 1
    args = keys, layout.get("cu_seqlens"), layout.get("lengths"), group
    return OPS["segment_pool"](x, *args, *rule.op_args(), compact)


def parts(pooled: fc.Pooled) -> tuple[Tensor, ...]:
    s = pooled.segments
    return pooled.values, s.starts, s.lengths, s.cu_segments


def assert_same_parts(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    # Compare the segments first: values of other segments cannot be compared.
    names = ("values", "starts", "lengths", "cu_segments")
    for name, a, b in reversed(list(zip(names, actual, expected, strict=True))):
        assert_same_bits(a, b, f"{what}: {name}")


def assert_same_pooled(actual: fc.Pooled, expected: fc.Pooled, what: str = "") -> None:
    assert_same_parts(parts(actual), parts(expected), what)
    a, b = actual.segments, expected.segments
    assert_same_bits(a.frame_cu_seqlens, b.frame_cu_seqlens, f"{what}: frame_cu_seqlens")
    assert (a.num_rows, a.padded_length) == (b.num_rows, b.padded_length), what


@pytest.fixture
def threads() -> Iterator:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Fused, composed, reference


def check_batch(batch: Batch, rule: fc.Rule, compact: bool) -> None:
    what = f"{batch}, {rule}, compact={compact}"
    fused = fc.segment_pool(batch.x, rule=rule, compact=compact, **batch.layout)
    assert_same_pooled(fused, composed(batch.x, rule, compact=compact, **batch.layout), f"{what}: composed")
    assert_same_parts(parts(fused), definition(batch.x, rule, compact=compact, **batch.layout), f"{what}: reference")
    frames = [0, *torch.tensor([end - begin for begin, end in batch.sequences()]).cumsum(0).tolist()]
    assert fused.segments.frame_cu_seqlens.tolist() == frames, what


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(("dtype", "rule"), DTYPES_AND_RULES, ids=str)
def test_fused_is_composed_is_reference(dtype: torch.dtype, rule: fc.Rule, compact: bool):
    for batch in batches(33, dtype):
        check_batch(batch, rule, compact)


@pytest.mark.parametrize(("width", "kind"), WIDTHS_AND_FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_and_feature(dtype: torch.dtype, width: int, kind: str):
    check_batch(packed(kind, width, dtype), fc.LocalMax(), True)
    check_batch(padded(kind, width, dtype), fc.Threshold(0.9, min_len=2, max_len=5), True)


# Dtypes and widths: how a row is read. Rules: `x` is not scored, or prominences need the three steps.
@pytest.mark.parametrize(
    ("dtype", "width", "rule"),
    [
        *((dtype, width, fc.LocalMax()) for dtype in DTYPES for width in (1, 31, 64, 129)),
        *((torch.float32, 31, rule) for rule in (fc.Uniform(3), fc.LocalMax(prominence=0.1))),
    ],
    ids=str,
)
def test_strides_do_not_matter(dtype: torch.dtype, width: int, rule: fc.Rule):
    for batch in (packed("smooth", width, dtype), padded("smooth", width, dtype)):
        expected = fc.segment_pool(batch.x, rule=rule, **batch.layout)
        for name, x in strided(batch.x):
            assert_same_pooled(fc.segment_pool(x, rule=rule, **batch.layout), expected, f"{batch}, {name}")
            keyed = fc.segment_pool(batch.x, rule=rule, keys=x, **batch.layout)
            assert_same_pooled(keyed, expected, f"{batch}, keys: {name}")


def test_strided_offsets_lengths_and_groups():
    batch = packed("smooth", 16, torch.float32)
    cu, group = batch.layout["cu_seqlens"], (torch.arange(len(batch.x)) // 9 % 3 - 1).int()
    expected = fc.segment_pool(batch.x, cu_seqlens=cu, row_group=group)
    apart = [torch.stack([t, torch.full_like(t, 77)], dim=1)[:, 0] for t in (cu, group)]
    assert not apart[0].is_contiguous()
    assert_same_pooled(fc.segment_pool(batch.x, cu_seqlens=apart[0], row_group=apart[1]), expected)
    batch = padded("smooth", 16, torch.float32)
    lengths = batch.layout["lengths"]
    apart = torch.stack([lengths, lengths - 9], dim=1)[:, 0]
    assert_same_pooled(fc.segment_pool(batch.x, lengths=apart), fc.segment_pool(batch.x, lengths=lengths))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sequences_may_be_permuted(rule: fc.Rule):
    batch = packed("smooth", 24, torch.float32)
    pooled = fc.segment_pool(batch.x, rule=rule, **batch.layout)
    order = torch.randperm(len(RAGGED)).tolist()
    x = torch.cat([batch.x.split(RAGGED)[b] for b in order])
    moved = fc.segment_pool(x, rule=rule, cu_seqlens=offsets(tuple(RAGGED[b] for b in order)))
    counts = pooled.segments.counts.tolist()
    assert moved.segments.counts.tolist() == [counts[b] for b in order]
    for name, a, b in (
        ("values", moved.values, pooled.values),
        ("lengths", moved.segments.lengths, pooled.segments.lengths),
    ):
        assert_same_bits(a, torch.cat([b.split(counts)[i] for i in order]), name)


# Dtypes: keys of the dtype of x are scored in the same pass, others in three steps. Widths: narrower than x, and wider.
@pytest.mark.parametrize(
    ("dtype", "key_dtype", "key_width", "rule"),
    [
        *((dtype, key_dtype, 48, fc.LocalMax()) for dtype in DTYPES for key_dtype in DTYPES),
        *((dtype, dtype, 1, fc.LocalMax()) for dtype in DTYPES),
        *((torch.float32, torch.float32, 48, rule) for rule in (FEW_RULES[0], FEW_RULES[2])),
        *((torch.float32, dtype, 1, fc.LocalMax(prominence=0.1)) for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_keys_are_scored_and_x_is_pooled(dtype: torch.dtype, key_dtype: torch.dtype, key_width: int, rule: fc.Rule):
    for batch in (packed("iid", 33, dtype), padded("iid", 33, dtype)):
        keys = torch.randn(*batch.x.shape[:-1], key_width).to(key_dtype)
        pooled = fc.segment_pool(batch.x, keys=keys, rule=rule, **batch.layout)
        assert_same_pooled(pooled, composed(batch.x, rule, keys=keys, **batch.layout), str(batch))
        assert_same_parts(parts(pooled), definition(batch.x, rule, keys=keys, **batch.layout), str(batch))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce(dtype: torch.dtype, reduce: str):
    for batch in batches(19, dtype):
        rule = fc.LocalMax()
        pooled = fc.segment_pool(batch.x, rule=rule, reduce=reduce, **batch.layout)
        assert_same_pooled(pooled, composed(batch.x, rule, reduce=reduce, **batch.layout), str(batch))
        _, starts, lengths, _ = definition(batch.x, rule, **batch.layout)
        expected = OPS["segment_reduce"](batch.x.reshape(-1, 19), starts, lengths, reduce)
        assert_same_bits(pooled.values, expected, str(batch))


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_weights(weight_dtype: torch.dtype):
    for batch in (packed("smooth", 19, torch.float32), padded("smooth", 19, torch.float32)):
        weights = torch.rand(batch.x.shape[:-1], dtype=torch.float64).to(weight_dtype)
        pooled = fc.segment_pool(batch.x, weights=weights, **batch.layout)
        starts, lengths = pooled.segments.starts, pooled.segments.lengths
        assert_same_pooled(pooled, composed(batch.x, fc.LocalMax(), weights=weights, **batch.layout))
        flat = batch.x.reshape(-1, 19), weights.flatten().float(), starts, lengths
        assert_same_bits(pooled.values, OPS["segment_weighted_mean"](*flat))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_module(reduce: str, compact: bool):
    module = fc.nn.SegmentPool("local-max:order=2", reduce, compact)
    assert repr(module) == f"SegmentPool(rule=local-max:order=2, reduce={reduce}, compact={compact})"
    assert not list(module.parameters()) and not module.state_dict()
    for batch in batches(16, torch.float32):
        expected = fc.segment_pool(batch.x, rule=fc.LocalMax(2), reduce=reduce, compact=compact, **batch.layout)
        assert_same_pooled(module(batch.x, **batch.layout), expected, str(batch))


# Results


@pytest.mark.parametrize(("dtype", "rule"), DTYPES_AND_RULES, ids=str)
def test_not_compact_is_compact_and_an_empty_tail(dtype: torch.dtype, rule: fc.Rule):
    for batch in batches(17, dtype):
        exact = fc.segment_pool(batch.x, rule=rule, **batch.layout)
        wide = fc.segment_pool(batch.x, rule=rule, compact=False, **batch.layout)
        count, rows = len(exact.values), exact.segments.num_rows
        name, size, _, _, min_len, max_len, _ = rule.op_args()
        grouped = "row_group" in batch.layout or "attention_mask" in batch.layout
        sequences = len(batch.sequences())
        bound = rows if grouped else max_segments(name, size, min_len, max_len, rows, sequences)
        values, starts, lengths, _ = parts(wide)
        assert len(values) == len(starts) == len(lengths) == bound >= count, batch
        heads = (values[:count], starts[:count], lengths[:count], wide.cu_seqlens)
        assert_same_parts(heads, parts(exact), str(batch))
        assert_same_bits(values[count:], torch.zeros(bound - count, 17, dtype=dtype), f"{batch}: tail")
        assert (starts[count:] == rows).all() and (lengths[count:] == 0).all()
        assert_same_bits(wide.segments.ids(), exact.segments.ids(), str(batch))


@pytest.mark.parametrize("rows", [1, 40, 5000, 200_000])
def test_storage_is_exactly_the_tokens(rows: int):
    x = torch.randn(rows, 64)  # up to 51 MB, for which the library asks for huge pages (csrc/cpu/tensors.cpp)
    for reduce in ("mean", "sum"):
        pooled = fc.segment_pool(x, rule=fc.LocalMax(order=3), reduce=reduce)
        values, starts, lengths, cu_segments = parts(pooled)
        assert values.is_contiguous() and 0 < len(values) <= rows // 4 + 1
        assert values.untyped_storage().nbytes() == len(values) * 64 * 4
        for tensor in (starts, lengths, cu_segments):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("compact", [True, False])
def test_to_padded(compact: bool):
    for batch in batches(8, torch.float32):
        pooled = fc.segment_pool(batch.x, rule=fc.LocalMax(), compact=compact, **batch.layout)
        out, counts = pooled.to_padded()
        assert_same_bits(counts, pooled.segments.counts, str(batch))
        assert out.shape == (len(batch.sequences()), max(counts.tolist(), default=0), 8)
        for b, (row, count) in enumerate(zip(out, counts.tolist(), strict=True)):
            first = int(pooled.cu_seqlens[b])
            assert_same_bits(row[:count], pooled.values[first : first + count], str(batch))
            assert not row[count:].any()


def test_to_padded_gradient():
    batch = packed("smooth", 8, torch.float32)
    pooled = fc.segment_pool(batch.x.requires_grad_(), **batch.layout)
    out, counts = pooled.to_padded()
    grad = torch.randn_like(out)
    inside = torch.cat([row[:count] for row, count in zip(grad, counts.tolist(), strict=True)])
    expected = torch.autograd.grad(pooled.values, batch.x, inside, retain_graph=True)[0]
    assert_same_bits(torch.autograd.grad(out, batch.x, grad)[0], expected)


# Gradients


def mean_gradient(grad: Tensor, segments: fc.Segments, like: Tensor) -> Tensor:
    """Return ``grad[segment] / length`` for each frame, divided in fp32 (fp64) and rounded once; 0 outside segments."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    share = (grad.to(wide) / segments.lengths.clamp_min(1).to(wide)[:, None]).to(grad.dtype)
    ids = segments.ids()
    rows = torch.cat([share, share.new_zeros(1, share.shape[1])])[torch.where(ids < 0, len(share), ids)]
    return rows.view(like.shape)


# Dtypes: how a row is written. Rules: some rows are in no segment. Not compact: trailing segments are empty.
@pytest.mark.parametrize(
    ("dtype", "rule", "compact"),
    [
        *((dtype, fc.LocalMax(), compact) for dtype in DTYPES for compact in (True, False)),
        *((torch.float32, rule, True) for rule in (*FEW_RULES[::2], fc.LocalMax(prominence=0.1))),
        *((torch.float32, fc.Uniform(3, tail="drop"), compact) for compact in (True, False)),
    ],
    ids=str,
)
def test_gradient_is_shared_evenly(dtype: torch.dtype, rule: fc.Rule, compact: bool):
    for batch in batches(21, dtype):
        for name, x in [("plain", batch.x), *strided(batch.x)]:
            x = x.detach().requires_grad_()
            pooled = fc.segment_pool(x, rule=rule, compact=compact, **batch.layout)
            grad = torch.randn(pooled.values.shape).to(dtype)
            (actual,) = torch.autograd.grad(pooled.values, x, grad)
            assert_same_bits(actual, mean_gradient(grad, pooled.segments, x), f"{batch}, {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_that_is_expanded_or_strided(dtype: torch.dtype):
    batch = padded("smooth", 21, dtype)
    x = batch.x.requires_grad_()
    pooled = fc.segment_pool(x, **batch.layout)
    pooled.values.sum().backward(retain_graph=True)
    ones = torch.ones_like(pooled.values)
    assert_same_bits(x.grad, mean_gradient(ones, pooled.segments, x), "sum")
    for name, grad in strided(torch.randn(pooled.values.shape).to(dtype)):
        (actual,) = torch.autograd.grad(pooled.values, x, grad, retain_graph=True)
        assert_same_bits(actual, mean_gradient(grad, pooled.segments, x), name)
    column = ones[:, :1].expand(-1, 21)
    (actual,) = torch.autograd.grad(pooled.values, x, column)
    assert_same_bits(actual, mean_gradient(ones, pooled.segments, x), "expanded")


@pytest.mark.parametrize("rule", [*FEW_RULES, fc.LocalMax(prominence=0.1)], ids=str)
def test_gradcheck(rule: fc.Rule):
    for batch in (packed("iid", 3, torch.float64, (5, 0, 1, 6)), padded("iid", 3, torch.float64, (5, 0, 1, 6))):
        x = batch.x.nan_to_num(0.5).requires_grad_()

        def run(x: Tensor, rule=rule, layout=batch.layout) -> Tensor:
            return fc.segment_pool(x, rule=rule, **layout).values

        assert torch.autograd.gradcheck(run, (x,))
        assert torch.autograd.gradgradcheck(run, (x,))


def test_double_backward_is_the_pooled_direction():
    batch = packed("smooth", 16, torch.float32)
    x = batch.x.requires_grad_()
    pooled = fc.segment_pool(x, **batch.layout)
    grad = torch.randn_like(pooled.values).requires_grad_()
    (grad_x,) = torch.autograd.grad(pooled.values, x, grad, create_graph=True)
    direction = torch.randn_like(x)
    (second,) = torch.autograd.grad(grad_x, grad, direction)
    assert_same_bits(second, fc.segment_reduce(direction, pooled.segments))


@pytest.mark.parametrize("fused", [True, False])
def test_what_needs_gradients(fused: bool):
    batch = packed("smooth", 16, torch.float32)
    rule = fc.LocalMax() if fused else fc.LocalMax(prominence=0.01)
    plain = fc.segment_pool(batch.x, rule=rule, **batch.layout)
    assert not plain.values.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        plain.values.sum().backward()
    x, keys = batch.x.clone().requires_grad_(), batch.x.clone().requires_grad_()
    assert not fc.segment_pool(batch.x, keys=keys, rule=rule, **batch.layout).values.requires_grad
    pooled = fc.segment_pool(x, keys=keys, rule=rule, **batch.layout)
    assert pooled.values.requires_grad
    assert not any(t.requires_grad for t in parts(pooled)[1:])
    pooled.values.sum().backward()
    assert keys.grad is None and x.grad is not None
    with torch.no_grad():
        assert not fc.segment_pool(x, rule=rule, **batch.layout).values.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_batch_cut_from_a_longer_one(dtype: torch.dtype):
    """The rows of such a batch are not evenly spaced in memory."""
    longer = features("smooth", 3 * 30, 24, dtype).view(3, 30, 24)
    cut, lengths = longer[:, :20], torch.tensor([20, 3, 17])
    pooled, expected = (fc.segment_pool(x, lengths=lengths) for x in (cut, cut.contiguous()))
    assert_same_bits(pooled.values, expected.values)
    assert_same_bits(pooled.segments.starts, expected.segments.starts)


@pytest.mark.parametrize("rule", [fc.LocalMax(prominence=0.1), fc.LocalMax(), fc.Uniform(3)], ids=str)
def test_padded_batch_without_columns(rule: fc.Rule):
    x = torch.randn(3, 4, 0)
    assert fc.segment_pool(x, rule=rule).values.shape[1:] == (0,)
    assert OPS["segment_pool"](x, None, None, None, None, *rule.op_args(), True)[0].shape[1:] == (0,)


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_threshold_is_rounded_to_the_dtype_of_the_distance(shift: int):
    """A threshold that rounds to the fp32 distance is not exceeded by it."""
    x = features("iid", 12, 8, torch.float32)
    value = fc.adjacent_distance(x)[3]
    near = float(value) + shift * 1e-12  # rounds to the same fp32 number
    assert torch.tensor(near, dtype=torch.float32) == value
    assert 4 not in fc.segment_pool(x, rule=fc.Threshold(near)).segments.starts


def test_reference_takes_a_prominence_that_is_just_reached():
    d = torch.tensor([0.0, 0.5, 0.25, 0.75, 0.0, 0.0])
    rule = fc.LocalMax(prominence=0.25)
    starts, _, _ = OPS["select_boundaries"](d, None, None, None, *rule.op_args(), True)
    assert starts.tolist() == fc.select_boundaries(d, rule).starts.tolist() == [0, 2, 4]
