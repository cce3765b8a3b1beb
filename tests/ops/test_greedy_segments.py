"""``greedy_boundaries``, the op of ``greedy_segments``, on every backend. test_token_merging.py has an oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from tests.support.sample_inputs import (
    DTYPES,
    FEATURES,
    RAGGED,
    Batch,
    assert_same_bits,
    expanded,
    features,
    offsets,
    packed,
    padded,
    strided,
)

op = torch.ops.fastcompress.greedy_boundaries
#: Thresholds and longest segments: few segments, many, some below a cosine of zero.
SETTINGS = ((0.15, 0), (0.6, 4), (1.1, 0))


def arguments(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return batch.x, batch.layout.get("cu_seqlens"), batch.layout.get("lengths")


def check(batch: Batch, settings: tuple[tuple[float, int], ...] = SETTINGS) -> None:
    for threshold, max_len in settings:
        given = *arguments(batch), threshold, max_len
        expected = DEFINITION["greedy_boundaries"](*given)
        assert_same_bits(op(*given), expected, f"{batch}, {threshold}, {max_len}")


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_to_the_bit(dtype: torch.dtype, kind: str):
    for i, width in enumerate((1, 7, 32, 70)):
        check(packed(kind, width, dtype), SETTINGS[i % 3 :][:1])
    check(padded(kind, 257, dtype, (0, 1, 30, 2, 9)), SETTINGS[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype):
    x = features("smooth", 60, 24, dtype)
    layouts = [
        Batch("one-sequence", x, {}),
        Batch("int64", x, {"cu_seqlens": torch.tensor([0, 30, 30, 60])}),
        Batch("padded-full", x.view(3, 20, 24), {}),
        Batch("padded-int32", x.view(3, 20, 24), {"lengths": torch.tensor([20, 0, 1], dtype=torch.int32)}),
        Batch("no-sequence", x[:0], {"cu_seqlens": offsets(())}),
        Batch("no-frame", x[:0], {"cu_seqlens": offsets((0, 0))}),
        Batch("padded-no-frame", x[:0].view(2, 0, 24), {"lengths": torch.tensor([0, 0])}),
        Batch("no-column", x[:, :0], {}),
    ]
    for batch in (*layouts, padded("iid", 8, dtype, ())):
        check(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype):
    for batch in (packed("smooth", 40, dtype), padded("smooth", 40, dtype)):
        expected = op(*arguments(batch), 0.3, 0)
        assert 0 < expected.sum() < expected.numel()
        for name, x in strided(batch.x):
            assert_same_bits(op(x, *arguments(batch)[1:], 0.3, 0), expected, name)
    for name, x in expanded(40, 40, dtype):
        check(Batch(name, x, {}))


def test_sequences_are_independent():
    batch = packed("smooth", 16, torch.float32)
    together = op(*arguments(batch), 0.2, 0)
    for begin, end in batch.sequences():
        assert_same_bits(together[begin:end], op(batch.x[begin:end], None, None, 0.2, 0))
        assert together[begin:end][:1].all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_that_is_not_finite_is_alone(dtype: torch.dtype, value: float):
    """With any threshold, such a frame joins no segment, and no frame joins it. The next frame starts a segment."""
    x = features("smooth", 24, 40, dtype)
    x[9, 3] = value
    for threshold in (0.4, 2.5):
        found = op(x, None, None, threshold, 0)
        assert found[9] and found[10]
        assert_same_bits(found[:9], op(x[:9], None, None, threshold, 0))
        assert_same_bits(found[10:], op(x[10:], None, None, threshold, 0))
    two = x.clone()
    two[8] = value
    assert op(two, None, None, 2.5, 0).nonzero().flatten().tolist() == [0, 8, 9, 10]


def test_zero_frames_have_cosine_0():
    x = torch.zeros(6, 40)
    x[2] = 1.0
    assert op(x, None, None, 0.9, 0).all()
    assert op(x, None, None, 1.0, 0).tolist() == [True] + [False] * 5
    assert op(x, None, None, 1.0, 4).tolist() == [True, False, False, False, True, False]
    assert op(x, None, None, math.nan, 0).all() and op(x, None, None, -math.inf, 0).all()
    assert op(x, None, None, math.inf, 0).sum() == 1


def test_long_segments_are_counted_in_full():
    """The mean cosine of equal frames stays 1, up to the rounding of the sum."""
    frame = features("iid", 1, 64, torch.float32)
    x = frame.expand(5000, 64).contiguous()
    assert op(x, None, None, 5000 * 2.0**-24, 0).sum() == 1
    assert op(torch.cat([x, -frame]), None, None, 1.0, 0).nonzero().flatten().tolist() == [0, 5000]


@pytest.fixture
def threads() -> Iterator:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_matter(dtype: torch.dtype, threads):
    """The input is large enough for several threads, and sequences cross the borders between the threads' parts."""
    lengths = (3000, 0, 1, *range(40), 2500, 2900)
    batch = packed("smooth", 256, dtype, lengths)
    x = torch.nn.utils.rnn.pad_sequence(list(batch.x.split(list(lengths))), True)[:, :1500]
    sizes = torch.tensor(lengths).clamp_max(1500)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append((op(*arguments(batch), 0.2, 0), op(x, None, sizes, 0.2, 0)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


def test_an_upper_bound_without_a_count():
    batch = packed("smooth", 16, torch.float32)
    found = fc.greedy_segments(batch.x, 0.2, **batch.layout)
    bound = fc.greedy_segments(batch.x, 0.2, **batch.layout, compact=False)
    count = len(found.starts)
    assert len(bound.starts) == len(batch.x) + len(RAGGED) > count
    assert torch.equal(bound.starts[:count], found.starts) and not bound.lengths[count:].any()


@pytest.mark.parametrize("how", ["packed", "padded"])
def test_compiled_and_exported(how: str):
    class Greedy(torch.nn.Module):
        def forward(self, x: Tensor, layout: dict[str, Tensor]) -> fc.Segments:
            return fc.greedy_segments(x, 0.3, max_len=5, **layout)

    make = packed if how == "packed" else padded
    batches = [make("smooth", 6, torch.float32, lengths) for lengths in ((5, 7, 3), (2, 0, 9, 1), (40, 17, 3))]
    model = Greedy()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    first = batches[0]
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if how == "padded" else {0: Dim.DYNAMIC}
    shapes = {"x": dynamic, "layout": {name: {0: Dim.DYNAMIC} for name in first.layout}}
    exported = torch.export.export(model, (first.x, first.layout), dynamic_shapes=shapes).module()
    for batch in batches:
        wanted = model(batch.x, batch.layout)
        for f in (compiled, exported):
            found = f(batch.x, batch.layout)
            assert isinstance(found, fc.Segments)
            for name in ("starts", "lengths", "cu_segments"):
                assert_same_bits(getattr(found, name), getattr(wanted, name), f"{batch}, {name}")


def test_no_gradient_is_asked_for():
    x = features("smooth", 20, 8, torch.float32).requires_grad_()
    segments = fc.greedy_segments(x, 0.2)
    fc.segment_reduce(x, segments).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fc.greedy_segments(x, 0.2).starts, segments.starts)
