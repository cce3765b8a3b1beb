"""The CUDA kernels in an emulator on the CPU.

They return the bits of the CPU kernels in every order of threads, and handle invalid input without an access out of
bounds. test_cuda_emulator.py tests that the emulator finds bugs. ``make test-emulated`` runs the tests of the ops on
the emulated kernels.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.ops.integrate_and_fire import integrate_rows
from fastcompress.reference import OPS
from tests.support.capturing import capturing
from tests.support.cuda_emulation import DEFAULT_DEVICE, SCHEDULES, build, emulated, has_kernel, load, run
from tests.support.sample_inputs import (
    BAD_OFFSETS,
    DTYPES,
    DTYPES_AND_RULES,
    RULES,
    TOKENS,
    assert_same_bits,
    batches,
    features,
    offsets,
    packed,
    packing,
    padded,
    row_groups,
    strided,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the emulator is x86-64 code"),
    pytest.mark.emulated,
    pytest.mark.xdist_group("emulated"),  # one worker compiles
    pytest.mark.timeout(900),  # the first test includes the compilation
]

# For rows of 64 fp32 columns, these GPUs have tiles of many rows, tiles of few rows, and too little shared memory to
# stage rows.
DEVICES = ((1, 100 << 10, 99 << 10), (64, 100 << 10, 99 << 10), (4, 1 << 10, 1 << 10))


def assert_same(f: Callable[[], Tensor | tuple[Tensor, ...] | fc.Pooled], schedules=SCHEDULES) -> None:
    """Assert that ``f`` returns the same bits on the CPU kernels and on the emulated ones."""

    def outputs() -> tuple[Tensor, ...]:
        result = f()
        if isinstance(result, fc.Pooled):
            s = result.segments
            return result.values, s.starts, s.lengths, s.cu_segments
        return result if isinstance(result, tuple) else (result,)

    expected = outputs()
    for seed, os_threads in schedules:
        with emulated(seed, os_threads):
            actual = outputs()
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, b, f"output {i}, order {seed}, {os_threads} resident blocks")


# The same bits


@pytest.mark.parametrize(("dtype", "rule"), DTYPES_AND_RULES, ids=str)
def test_segment_pool(dtype: torch.dtype, rule: fc.Rule):
    for width in (7, 64):  # rows that are moved by elements and by 16 bytes
        for batch in batches(width, dtype):
            for compact in (True, False):
                assert_same(
                    lambda batch=batch, compact=compact: fc.segment_pool(
                        batch.x, rule=rule, compact=compact, **batch.layout
                    ),
                    SCHEDULES[2:] if compact else SCHEDULES[1:2],
                )


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_segment_pool_in_tiles_of_every_size(device: tuple[int, int, int]):
    x = packed("smooth", 64, torch.float32, (300, 0, 1, 77, 150)).x
    layout = {"cu_seqlens": offsets((300, 0, 1, 77, 150))}
    groups = row_groups(len(x))
    load().set_device(*device)
    try:
        for rule in RULES:
            for row_group in (None, groups):
                assert_same(
                    lambda rule=rule, row_group=row_group: fc.segment_pool(
                        x, rule=rule, row_group=row_group, compact=False, **layout
                    ),
                    ((3, 2),),
                )
    finally:
        load().set_device(*DEFAULT_DEVICE)


LONG_RULES = (fc.LocalMax(), fc.Threshold(0.5), fc.Uniform(400), fc.Uniform(1), fc.LocalMax(order=16))


@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
def test_segments_longer_than_tiles(rule: fc.Rule):
    """One segment spans many tiles, with or without another one after it, or each row is a segment."""
    for length in (1, 63, 64, 65, 129, 400):
        flat = torch.ones(length, 32)
        steps = torch.cat([flat, -flat, features("smooth", 5, 32, torch.float32)])
        for x in (flat, steps):
            assert_same(lambda x=x: fc.segment_pool(x, rule=rule, compact=False), ((4, 2),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_strides(dtype: torch.dtype):
    x = features("smooth", 90, 24, dtype)
    keys = features("smooth", 90, 5, dtype, seed=1)
    for _, same in strided(x):
        assert_same(lambda same=same: fc.segment_pool(same), ((5, 1),))
        assert_same(lambda same=same: fc.segment_pool(same, keys=keys), ((5, 1),))
        assert_same(lambda same=same: fc.adjacent_distance(same, lag=2), ((5, 1),))


@pytest.mark.parametrize("rule", [fc.LocalMax(), fc.Threshold(0.1)], ids=str)
def test_keys_that_are_part_of_x(rule: fc.Rule):
    """Keys can start at the address of x and be narrower, or have another row stride."""
    base = features("smooth", 180, 64, torch.float32)
    x = base[:90]
    for keys in (x[:, :16], x[:, :3], base[::2], x):
        assert_same(lambda keys=keys: fc.segment_pool(x, keys=keys, rule=rule), ((5, 1),))
    padded = x.view(3, 30, 64)
    assert_same(lambda: fc.segment_pool(padded, keys=padded[..., :32], rule=rule), ((5, 1),))


def calls(x: Tensor, layout: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], Tensor | tuple[Tensor, ...]]]]:
    """Yield calls of every other op on the rows of ``x``."""
    ops = torch.ops.fastcompress
    rows = x.reshape(-1, x.shape[-1])
    cu, lengths = layout.get("cu_seqlens"), layout.get("lengths")
    starts = torch.tensor([0, 1, 3, 3, 30, 97])
    sizes = torch.tensor([1, 2, 0, 20, 66, 10])
    assert int(starts[-1] + sizes[-1]) <= len(rows)
    y, grad = features("iid", 6, x.shape[-1], x.dtype, seed=3), features("iid", 6, x.shape[-1], x.dtype, seed=4)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = features("zeros", len(rows), 1, wide, seed=5)[:, 0]
    for lag in (1, 3):
        yield f"distance {lag}", lambda lag=lag: ops.adjacent_distance(x, cu, lengths, lag)
        slope = features("iid", len(rows), 1, wide, seed=6)[:, 0].reshape(x.shape[:-1])
        yield (
            f"distance backward {lag}",
            lambda lag=lag, slope=slope: ops.adjacent_distance_backward(slope, x, cu, lengths, lag),
        )
    yield "greedy", lambda: ops.greedy_boundaries(x, cu, lengths, 0.3, 9)
    for reduce in ("mean", "sum", "max", "first", "last", "middle"):
        yield reduce, lambda reduce=reduce: ops.segment_reduce(rows, starts, sizes, reduce)
        if reduce != "max":
            yield f"expand {reduce}", lambda reduce=reduce: ops.segment_expand(y, starts, sizes, len(rows), reduce)
    best = ops.segment_reduce(rows, starts, sizes, "max")
    yield "max backward", lambda: ops.segment_max_backward(grad, rows, best, starts, sizes)
    mean = ops.segment_weighted_mean(rows, weights, starts, sizes)
    yield "weighted mean", lambda: ops.segment_weighted_mean(rows, weights, starts, sizes)
    yield "weighted mean backward", lambda: ops.segment_weighted_mean_backward(grad, rows, mean, weights, starts, sizes)
    # The tokens that lie inside the rows. Some rows are the first of many tokens, and some are in no token.
    tokens = tuple(part[TOKENS[0] + TOKENS[1] <= len(rows)] for part in TOKENS)
    slopes = features("iid", len(tokens[0]), x.shape[-1], x.dtype, seed=7)
    first, divisors = features("iid", len(tokens[0]), 2, wide, seed=8).T
    yield "integrate", lambda: ops.integrate_rows(rows, weights, first, None, *tokens)
    yield "integrate and divide", lambda: ops.integrate_rows(rows, weights, first, divisors, *tokens)
    yield "integrate backward", lambda: ops.integrate_rows_backward(slopes, rows, weights, first, *tokens)


# Widths: rows that are moved by elements or by 16 bytes, in one step of a block or several. Kinds: special values.
@pytest.mark.parametrize(
    ("kind", "widths"), [("smooth", (1, 33, 64, 320)), ("nonfinite", (33,)), ("zeros", (33,))], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_ops(dtype: torch.dtype, kind: str, widths: tuple[int, ...]):
    for width in widths:
        for batch in (packed(kind, width, dtype), padded(kind, width, dtype)):
            for _, call in calls(batch.x, batch.layout):
                assert_same(call, ((6, 1),))


@pytest.mark.parametrize("rule", [fc.MinVariance(2.5, 4), fc.MinVariance(6, 12), fc.MinVariance(5, 40)], ids=str)
def test_min_variance(rule: fc.MinVariance):
    """The kernels for segments of up to 8, up to 12 and more rows; several blocks, which threads take in any order."""
    for width, dtype in ((6, torch.float64), (16, torch.bfloat16)):
        for batch in (packed("smooth", width, dtype), padded("repeated", width, dtype)):
            assert_same(lambda b=batch: fc.segment_pool(b.x, rule=rule, **b.layout).segments.starts, ((6, 1), (7, 2)))
    d = torch.rand(3200, rule.max_len - 1, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    op = torch.ops.fastcompress.min_variance_boundaries
    for group in (None, row_groups(3200)):
        assert_same(lambda g=group: op(d, None, None, g, rule.rate, rule.max_len), ((8, 2),))


def test_gradients():
    def gradients() -> tuple[Tensor, ...]:
        x = features("smooth", 60, 16, torch.float32).requires_grad_()
        weights = features("iid", 60, 1, torch.float32, seed=1)[:, 0].abs().requires_grad_()
        pooled = fc.segment_pool(x, rule=fc.LocalMax())
        weighted = fc.segment_pool(x, rule=fc.Uniform(3), weights=weights)
        loss = pooled.values.square().sum() + weighted.values.square().sum() + fc.adjacent_distance(x)[:-1].sum()
        return torch.autograd.grad(loss, (x, weights))

    assert_same(gradients)


def test_packing():
    ops = torch.ops.fastcompress
    for seed in range(6):
        for compact in (True, False):
            arguments = packing(seed, 400 if seed else 1, compact=compact)
            assert_same(lambda a=arguments: ops.pack_map(*a.values()))
            index, source, target, cu = ops.pack_map(*arguments.values())
            labels = torch.arange(len(arguments["row_group"]))
            for given in (labels, None):
                assert_same(lambda s=source, cu=cu, a=arguments, g=given: ops.pack_labels(s, cu, a["row_group"], g))
            for width, dtype in ((64, torch.bfloat16), (7, torch.float32), (700, torch.float64)):
                table = features("iid", 50, width, dtype)
                audio = features("nonfinite", arguments["num_audio_rows"], width, dtype)
                for _, same in strided(audio):
                    assert_same(lambda t=table, a=same, i=index, to=target: ops.pack_rows(t, a, i, to, True), ((5, 1),))
    padded_groups = row_groups(60, 3).view(3, 20)
    lengths = torch.tensor([20, 0, 7])
    kept_or_audio = fc.select_boundaries(torch.zeros(3, 20), "uniform:99", lengths=lengths, row_group=padded_groups)
    kept = int(((padded_groups == 0) & (torch.arange(20) < lengths[:, None])).sum())
    cu = torch.arange(len(kept_or_audio.starts) - kept + 1)
    assert_same(lambda: ops.pack_map(padded_groups, None, None, lengths, cu, 60, int(cu[-1]), True))


BAD_PACKINGS = {
    "cu_seqlens must": {"cu_seqlens": torch.tensor([0, 500, 20, 400]).int()},
    "input_ids must lie in [0, 50)": {"ids": torch.full((400,), BIG_ID := 2**62)},
    "audio_cu_seqlens must start at 0": {"audio_cu_seqlens": torch.tensor([5, 9])},
    "audio_cu_seqlens must not decrease": {"audio_cu_seqlens": torch.tensor([0, BIG_ID, -BIG_ID, 7, 9])},
    "audio_cu_seqlens must end": {"num_audio_rows": 3},
    "audio has only 1 audios": {"audio_cu_seqlens": torch.tensor([0, 2]), "num_audio_rows": 2},
    "more": {"audio_cu_seqlens": torch.arange(401), "num_audio_rows": 400},
}


@pytest.mark.parametrize("message", BAD_PACKINGS)
def test_wrong_packings(message: str, monkeypatch: pytest.MonkeyPatch):
    arguments = packing(1, **BAD_PACKINGS[message])
    table = features("iid", 50, 16, torch.float32)
    audio = features("iid", arguments["num_audio_rows"], 16, torch.float32)
    text = "places for them" if message == "more" else message
    with emulated(9):
        with pytest.raises(RuntimeError):
            torch.ops.fastcompress.pack_map(*arguments.values())
        given = {k: arguments[k] for k in ("row_group", "cu_seqlens", "audio_cu_seqlens")}
        with pytest.raises(ValueError, match=re.escape(text)):
            fc.pack(arguments["ids"], table, audio, **given)
        packed = fc.pack(arguments["ids"], table, audio, **given, compact=False)
        assert ((-1 <= packed.source) & (packed.source < 400 + len(audio))).all()
        assert ((0 <= packed.cu_seqlens) & (packed.cu_seqlens <= len(packed.source))).all()
        monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
        with pytest.raises(RuntimeError, match="index must lie"):
            torch.ops.fastcompress.pack_rows(table, audio, torch.tensor([0, -2, BIG_ID]), packed.source, True)


# Invalid input: an error where the count is read, and never an access out of bounds (`make sanitize` checks this)


BIG = 2**63 - 1
BAD_SEGMENTS = (  # starts, lengths
    ([0, 5], [6, 1]),
    ([-1], [3]),
    ([18], [3]),
    ([BIG], [BIG]),
    ([-BIG, 3], [BIG, -2]),
    ([9, 2], [1, 1]),
)


# The kernels of all rules read offsets in the same way, so one rule gets all offsets and the others get one.
@pytest.mark.parametrize(
    ("values", "rule"),
    [
        *((values, fc.LocalMax()) for values in BAD_OFFSETS),
        *((BAD_OFFSETS[0], rule) for rule in (fc.Uniform(3), fc.LocalMax(min_len=3), fc.Threshold(0.1))),
    ],
    ids=str,
)
def test_wrong_cu_seqlens(values: list[int], rule: fc.Rule):
    x = features("smooth", 60, 16, torch.float32)
    cu = torch.tensor(values, dtype=torch.int32)
    with emulated(7):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            fc.segment_pool(x, cu_seqlens=cu, rule=rule)
        pooled = fc.segment_pool(x, cu_seqlens=cu, rule=rule, compact=False)
        fc.adjacent_distance(x, cu_seqlens=cu)
        segments = pooled.segments
    assert ((0 <= segments.starts) & (segments.starts + segments.lengths <= 60)).all()
    assert ((0 <= segments.cu_segments) & (segments.cu_segments <= len(segments.starts))).all()


@pytest.mark.parametrize("values", [[5, 21], [-1, 20], [2**31 - 1, 0], [-(2**31), 2**31 - 1]], ids=str)
def test_wrong_lengths(values: list[int]):
    x = features("smooth", 40, 16, torch.float32).view(2, 20, 16)
    lengths = torch.tensor(values, dtype=torch.int32)
    with emulated(7):
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, 20\]"):
            fc.segment_pool(x, lengths=lengths)
        segments = fc.segment_pool(x, lengths=lengths, compact=False).segments
    assert ((0 <= segments.starts) & (segments.starts + segments.lengths <= 40)).all()


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    """FASTCOMPRESS_CHECK=1 must not break the capture of a CUDA graph, where waiting for the stream is an error."""
    x = features("smooth", 60, 16, torch.float32)
    cu = offsets((60,))
    arguments = packing(1, 400, compact=False)
    table, audio = (features("iid", rows, 16, torch.float32) for rows in (50, arguments["num_audio_rows"]))
    monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
    ops = torch.ops.fastcompress
    with emulated(7), capturing():
        for rule in (fc.LocalMax(), fc.LocalMax(min_len=3)):
            pooled = fc.segment_pool(x, cu_seqlens=cu, rule=rule, compact=False)
            segments = pooled.segments
            ops.segment_expand(pooled.values, segments.starts, segments.lengths, 60, "mean")
            with pytest.raises(RuntimeError, match="pass compact=False"):
                fc.segment_pool(x, cu_seqlens=cu, rule=rule)
        d = fc.adjacent_distance(x, cu_seqlens=cu)
        fc.select_boundaries(d, fc.Threshold(0.1), cu_seqlens=cu, compact=False)
        fc.greedy_segments(x, 0.5, cu_seqlens=cu, compact=False)
        index, _, target, _ = ops.pack_map(*arguments.values())
        ops.pack_rows(table, audio, index, target, True)


def test_more_segments_than_int32():
    """cu_segments is int32, and the public function checks it as well. Rows of width 0 take no memory."""
    x = torch.zeros(2**31, 0)
    with emulated(7):
        for rule in (("uniform", 1, 0.0, 0.0, 1, 0, True), ("threshold", 1, 0.5, 0.0, 1, 1, True)):
            with pytest.raises(RuntimeError, match=r"fewer than 2\^31 segments.* 2147483648 rows can have 214748364"):
                torch.ops.fastcompress.segment_pool(x, None, None, None, None, *rule, False)


def test_row_groups_of_any_value():
    x = features("smooth", 60, 16, torch.float32)
    groups = torch.randint(-(2**31), 2**31 - 1, (60,), dtype=torch.int32)
    groups[20:50] = 2**31 - 1
    for rule in RULES:
        assert_same(lambda rule=rule: fc.segment_pool(x, rule=rule, row_group=groups), ((8, 1),))


def test_long_runs_of_row_groups():
    """The number of earlier rows of its run that a row reads depends on the rule."""
    d = features("iid", 700, 1, torch.float32)[:, 0]
    groups = torch.ones(700, dtype=torch.int32)
    groups[[0, 300, 301, 650]] = torch.tensor([0, -1, 2, 0], dtype=torch.int32)
    for rule in (
        *(fc.LocalMax(order) for order in (1, 2, 20, 500, 2**63 - 1)),
        fc.LocalMax(prominence=0.5),
        fc.Threshold(0.5),
        fc.Uniform(7),
    ):
        assert_same(lambda rule=rule: fc.select_boundaries(d, rule, row_group=groups).starts, ((8, 1),))


@pytest.mark.parametrize("name", ["segment_max_backward", "segment_weighted_mean_backward"])
def test_backward_of_wrong_segments(name: str):
    """Regression: one of the two looped over each row of a gap of 2**62."""
    op, x, grad = getattr(torch.ops.fastcompress, name), torch.randn(20, 16), torch.randn(2, 16)
    weights = [torch.ones(20)] if "weighted" in name else []
    for starts, sizes in (*BAD_SEGMENTS, ([2**62], [1]), ([0, 2**62], [1, 1]), ([-BIG - 1, BIG], [BIG, BIG])):
        with emulated(9):  # any result is valid, but no access may be out of bounds
            op(grad[: len(starts)], x, grad[: len(starts)], *weights, torch.tensor(starts), torch.tensor(sizes))


@pytest.mark.parametrize("name", ["segment_reduce", "segment_expand"])
def test_wrong_segments(name: str, monkeypatch: pytest.MonkeyPatch):
    rows = features("iid", 20, 16, torch.float32)
    for starts, sizes in BAD_SEGMENTS:
        s, n = torch.tensor(starts), torch.tensor(sizes)
        segments = fc.Segments(s, n, torch.tensor([0, len(s)]).int(), torch.tensor([0, 20]).int(), 20)
        call = {
            "segment_reduce": lambda g=segments: fc.segment_reduce(rows, g),
            "segment_expand": lambda g=segments, s=s: fc.segment_expand(rows[: len(s)], g),
        }[name]
        with emulated(9):
            call()  # any result is valid, but no access may be out of bounds
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="segments"):
                patch.setenv("FASTCOMPRESS_CHECK", "1")
                call()


@pytest.mark.parametrize("values", [*BAD_SEGMENTS[1:], ([0, 4], [6, 1]), ([3], [0])], ids=str)
def test_wrong_tokens(values: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch):
    x, weights = features("iid", 20, 16, torch.float32).requires_grad_(), torch.ones(20)
    starts, lengths = map(torch.tensor, values)
    first = torch.ones(len(starts))
    with emulated(9):
        integrate_rows(x, weights, first, None, starts, lengths).sum().backward()  # no access may be out of bounds
        torch.ops.fastcompress.integrate_rows_backward(x[:0], x[:0], weights[:0], first[:0], starts[:0], lengths[:0])
        monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
        with pytest.raises(ValueError, match="starts must|lengths must|tokens must"):
            integrate_rows(x, weights, first, None, starts, lengths)
        with pytest.raises(RuntimeError, match="tokens must be in order, have at least one row each, share only"):
            torch.ops.fastcompress.integrate_rows_backward(x[: len(starts)], x, weights, first, starts, lengths)


@pytest.mark.sanitizer
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "kind, sanitizer, selection",
    [
        ("address", "asan", "not clean"),
        (
            "thread",
            "tsan",
            "(other_ops and smooth) or min_variance or gradients or tiles_of_every_size or longer_than or packing",
        ),
    ],
    ids=["address", "thread"],
)
def test_kernels_are_clean(kind: str, sanitizer: str, selection: str):
    """The tests above pass with the kernels under a sanitizer."""
    command = ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", __file__, "-k", selection]
    done = run(command, build(kind), sanitizer)
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, (done.stdout[-2000:], done.stderr[-4000:])


def test_every_op_has_a_kernel():
    with emulated():
        assert all(map(has_kernel, OPS))
