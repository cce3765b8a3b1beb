"""Merging of similar frames, adjacent or not, against loops that follow the definitions of the papers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import DTYPES, features

KINDS = ("iid", "smooth", "repeated", "zeros")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm().clamp_min(1e-8) * b.norm().clamp_min(1e-8)))


def greedy(x: Tensor, threshold: float, max_len: int | None, band: float) -> list[int]:
    """Return the starts of segments; whether a frame joins depends on its mean cosine to all members."""
    groups = [[0]] if len(x) else []
    x = x.double()
    for t in range(1, len(x)):
        mean = sum(cosine(x[t], x[m]) for m in groups[-1]) / len(groups[-1])
        if abs(mean - (1 - threshold)) < band:
            pytest.skip("too close to decide")
        if mean >= 1 - threshold and (max_len is None or len(groups[-1]) < max_len):
            groups[-1].append(t)
        else:
            groups.append([t])
    return [group[0] for group in groups]


# Dtypes and kinds: the values. Thresholds: many segments, few, and a cosine below 0. Lengths: no bound, 1, 4.
@pytest.mark.parametrize(
    ("dtype", "kind", "threshold", "max_len"),
    [
        *((dtype, kind, 0.6, 4) for dtype in DTYPES for kind in KINDS),
        *((torch.float32, "smooth", threshold, size) for threshold in (0.15, 0.6, 1.1) for size in (None, 1)),
        *((torch.float64, "iid", threshold, None) for threshold in (0.15, 1.1)),
    ],
    ids=str,
)
def test_greedy_segments(dtype: torch.dtype, kind: str, threshold: float, max_len: int | None):
    sizes = (30, 0, 1, 17)
    x = features(kind, sum(sizes), 6, dtype)
    band = 1e-9 if dtype == torch.float64 else 1e-5  # inside this band rounding can decide
    cu = torch.tensor([0, 30, 30, 31, 48])
    wanted = []
    for begin, size in zip(cu.tolist(), sizes, strict=False):
        wanted += [begin + t for t in greedy(x[begin : begin + size], threshold, max_len, band)]
    found = fc.greedy_segments(x, threshold, max_len=max_len, cu_seqlens=cu)
    assert found.starts.tolist() == wanted
    padded = torch.nn.utils.rnn.pad_sequence(list(x.split(list(sizes))), True, padding_value=9.0)
    by_lengths = fc.greedy_segments(padded, threshold, max_len=max_len, lengths=torch.tensor(sizes))
    assert by_lengths.lengths.tolist() == found.lengths.tolist()
    weights = torch.rand(4, 30, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert fc.segment_reduce(padded, by_lengths, weights=weights).shape == (len(wanted), 6)


def test_a_window_wider_than_there_are_frames():
    """Regression: the op searched for partners at each distance up to the window of 2**62."""
    x = features("iid", 30, 6, torch.float32)
    cu = torch.tensor([0, 17, 30])
    wide, enough = (fc.bipartite_merge(x, 2.0, window=window, cu_seqlens=cu) for window in (2**62, 29))
    assert wide.ids.tolist() == enough.ids.tolist() and wide.values.equal(enough.values)


def merge(
    x: Tensor, keys: Tensor, size: list[float], rate: float, window: int | None
) -> tuple[list[Tensor], list[list[int]]]:
    """Return the merged tokens of one sequence and their frames, by the definition."""
    count = len(x)
    best: list[tuple[float, int, int]] = []
    for t in range(0, count, 2):
        if window is None:
            others = range(1, count, 2)
        else:
            others = [t + 1] if window == 0 else [o for o in range(t - window, t + window + 1) if (o - t) % 2]
        found = [(cosine(keys[t], keys[o]), -abs(o - t), o) for o in others if 0 <= o < count]
        if found:
            value, _, other = max(found)
            best.append((value, t, other))
    best.sort(key=lambda item: (-item[0], item[1]))
    partner = {t: other for _, t, other in best[: max(0, count - math.ceil(count / rate))]}
    groups = {t: [t] for t in range(count) if t not in partner}
    for t, other in sorted(partner.items()):
        groups[other] = sorted([*groups[other], t])
    tokens = []
    for t in sorted(groups):
        w = torch.tensor([size[m] for m in groups[t]], dtype=x.dtype)
        tokens.append((w[:, None] * x[groups[t]]).sum(0) / w.sum())
    return tokens, [groups[t] for t in sorted(groups)]


# Windows: pairs, neighbours, several partners, all. Rates: no frame merges, some, half of them, or all that can.
@pytest.mark.parametrize(
    ("rate", "window"), [*((1.3, window) for window in (0, 1, 3, 6, None)), (1.0, 3), (2.0, 0), (2.0, None), (9.0, 3)]
)
def test_bipartite_merge(rate: float, window: int | None):
    g = torch.Generator().manual_seed(int(rate * 10))
    sizes = (21, 0, 1, 2, 16)
    cu = torch.tensor([0, 21, 21, 22, 24, 40])
    x = torch.randn(40, 5, dtype=torch.float64, generator=g).requires_grad_()
    keys = torch.randn(40, 3, dtype=torch.float64, generator=g)
    size = torch.randint(1, 5, (40,), generator=g).double()
    tokens, groups, counts = [], [], []
    for begin, count in zip(cu.tolist(), sizes, strict=False):
        part = slice(begin, begin + count)
        found, members = merge(x[part], keys[part], size[part].tolist(), rate, window)
        tokens += found
        groups += [[begin + m for m in group] for group in members]
        counts.append(len(found))
    wanted = torch.stack(tokens)
    out = fc.bipartite_merge(x, rate, window=window, keys=keys, size=size, cu_seqlens=cu)
    assert out.cu_seqlens.diff().tolist() == counts
    assert [[r for r in range(40) if out.ids[r] == i] for i in range(len(groups))] == groups
    torch.testing.assert_close(out.values, wanted, rtol=1e-12, atol=1e-12)
    assert out.sizes.tolist() == [sum(float(size[m]) for m in group) for group in groups]
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=g)
    torch.testing.assert_close(torch.autograd.grad(out.values, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])
    padded = torch.nn.utils.rnn.pad_sequence(list(x.detach().split(list(sizes))), True)
    padded_keys = torch.nn.utils.rnn.pad_sequence(list(keys.split(list(sizes))), True)
    padded_size = torch.nn.utils.rnn.pad_sequence(list(size.split(list(sizes))), True, padding_value=1.0)
    lengths = torch.tensor(sizes)
    again = fc.bipartite_merge(padded, rate, window=window, keys=padded_keys, size=padded_size, lengths=lengths)
    assert torch.equal(again.values, out.values.detach()) and torch.equal(again.cu_seqlens, out.cu_seqlens)


def test_ties_go_to_the_nearer_partner_and_the_earlier_frame():
    x = torch.arange(8.0)[:, None]
    for window in (1, 3, 7, None):
        out = fc.bipartite_merge(x, 8 / 6, window=window, keys=torch.ones(8, 2))
        assert out.ids.tolist() == [0, 0, 1, 1, 2, 3, 4, 5], window  # 0 into 1 and 2 into 3, not 2 into 1


def test_adjacent_merging_is_top_k_over_pairs():
    """A-ToMe merges the most similar of the pairs (0, 1), (2, 3), ..., in one round or several."""
    x = features("smooth", 40, 8, torch.float64)
    out = fc.bipartite_merge(x, 1.4)
    assert len(out.values) == math.ceil(40 / 1.4)
    pairs = [(cosine(x[t], x[t + 1]), t) for t in range(0, 40, 2)]
    merged = {t for _, t in sorted(pairs, reverse=True)[: 40 - len(out.values)]}
    assert {int(t) for t in range(0, 40, 2) if out.ids[t] == out.ids[t + 1]} == merged
    twice = fc.bipartite_merge(out.values, 1.5, size=out.sizes)
    assert float(twice.sizes.sum()) == 40.0
    mean = (twice.values * twice.sizes[:, None]).sum(0) / 40
    torch.testing.assert_close(mean, x.mean(0))


@pytest.mark.parametrize("window", (0, 5, None))
@pytest.mark.parametrize("rate, rounds", ((1.0, 1), (2.0, 1), (3.0, 2), (5.5, 3)))
def test_rates_above_two_take_rounds(rate: float, rounds: int, window: int | None):
    module = fc.nn.BipartiteMerge(rate, window)
    assert module.rounds == rounds and str(module) == f"BipartiteMerge(rate={rate}, window={window})"
    sizes = (41, 0, 1, 2, 30)
    x = features("iid", sum(sizes), 5, torch.float64)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    values, groups, counts = [], [], []
    for part in x.split(list(sizes)):
        members = [[t] for t in range(len(part))]
        for _ in range(rounds):
            size = [float(len(group)) for group in members]
            tokens, found = merge(part, part, size, rate ** (1 / rounds), window)
            part = torch.stack(tokens) if tokens else part
            members = [sorted(t for old in group for t in members[old]) for group in found]
        begin = sum(map(len, groups))
        groups += [[begin + t for t in group] for group in members]
        values.append(part)
        counts.append(len(part))
    out = module(x, cu_seqlens=cu)
    assert out.cu_seqlens.diff().tolist() == counts and sum(counts) <= 74 / rate + 5 * rounds
    assert [[r for r in range(len(x)) if out.ids[r] == i] for i in range(len(groups))] == groups
    assert out.sizes.tolist() == [len(group) for group in groups]
    torch.testing.assert_close(out.values, torch.cat(values), rtol=1e-12, atol=1e-12)
    lengths = torch.tensor(sizes)
    padded = module(torch.nn.utils.rnn.pad_sequence(list(x.split(list(sizes))), True), lengths=lengths)
    assert torch.equal(padded.values, out.values)
    inside = torch.arange(41) < lengths[:, None]
    assert torch.equal(padded.ids[inside.flatten()], out.ids) and (padded.ids[~inside.flatten()] == -1).all()
    with pytest.raises(ValueError, match="rate must be at least 1 and finite, got 0.5"):
        fc.nn.BipartiteMerge(0.5)


def test_silent_frames_are_equal_in_every_window():
    x = torch.cat([torch.zeros(4, 3), features("iid", 4, 3, torch.float32)])
    ids = [fc.bipartite_merge(x, 1.5, window=window).ids.tolist() for window in (0, 3, 8, None)]
    assert all(found[:4] == [0, 0, 1, 1] for found in ids), ids


def test_anywhere_in_odd_batches():
    """Autocast changes nothing, sequences can be empty, and one long sequence needs little memory."""
    x = features("iid", 41, 4, torch.float32)
    cu = torch.tensor([0, 20, 20, 21, 41])
    plain = fc.bipartite_merge(x, 1.5, window=None, cu_seqlens=cu)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fc.bipartite_merge(x, 1.5, window=None, cu_seqlens=cu).values, plain.values)
    none = fc.bipartite_merge(torch.randn(2, 3, 3), 1.5, window=None, lengths=torch.tensor([0, 0]))
    assert none.values.shape == (0, 3) and none.cu_seqlens.tolist() == [0, 0, 0]
    many = torch.cat([torch.tensor([0, 3000]), 3000 + 2 * torch.arange(1, 3001)])
    out = fc.bipartite_merge(torch.randn(9000, 2), 2.0, window=None, cu_seqlens=many)
    assert len(out.values) == 4500


@pytest.mark.parametrize(
    "merge",
    [
        lambda x, w, cu: fc.bipartite_merge(x, 1.5, size=w, cu_seqlens=cu),
        lambda x, w, cu: fc.bipartite_merge(x, 1.5, window=None, size=w, cu_seqlens=cu),
        lambda x, w, cu: fc.nn.BipartiteMerge(3.0, 5)(x, cu_seqlens=cu),
        lambda x, w, cu: fc.iterative_fusion(x, 8, weights=w, cu_seqlens=cu),
        lambda x, w, cu: fc.nn.GreedySegments(0.8)(x, cu_seqlens=cu),
    ],
    ids=["neighbours", "anywhere", "rounds in a window", "fusion", "greedy"],
)
def test_compiles(merge):
    x, cu = features("iid", 30, 4, torch.float32).requires_grad_(), torch.tensor([0, 11, 30])
    weights = torch.rand(30) + 0.5

    def run(x: Tensor, weights: Tensor, cu: Tensor) -> Tensor:
        return merge(x, weights, cu).values.square().sum()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weights, cu)
    eager = run(x, weights, cu)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(eager, x)[0])


def fuse(x: Tensor, weights: list[float], count: int) -> tuple[list[Tensor], list[list[int]]]:
    """Return the fused tokens of one sequence and their frames. Each round merges the most similar neighbours."""
    groups = [[t] for t in range(len(x))]
    while len(groups) > count:
        w = [torch.tensor([weights[t] for t in group], dtype=x.dtype) for group in groups]
        tokens = [(w[i][:, None] * x[group]).sum(0) / w[i].sum() for i, group in enumerate(groups)]
        likeness = sorted(range(len(groups) - 1), key=lambda i: (-cosine(tokens[i], tokens[i + 1]), -i))
        merges = len(groups) - max(math.ceil(len(groups) / 2), count)
        joined = set(likeness[:merges])
        fused: list[list[int]] = []
        for i, group in enumerate(groups):
            if i - 1 in joined:
                fused[-1] = fused[-1] + group
            else:
                fused.append(group)
        groups = fused
    w = [torch.tensor([weights[t] for t in group], dtype=x.dtype) for group in groups]
    return [(w[i][:, None] * x[group]).sum(0) / w[i].sum() for i, group in enumerate(groups)], groups


@pytest.mark.parametrize("weighted", (True, False))
@pytest.mark.parametrize("count", (1, 3, 7, 40))
def test_iterative_fusion(count: int, weighted: bool):
    g = torch.Generator().manual_seed(count)
    sizes = (29, 0, 1, 8, 15)
    cu = torch.tensor([0, 29, 29, 30, 38, 53])
    x = torch.randn(53, 5, dtype=torch.float64, generator=g).requires_grad_()
    weights = (torch.rand(53, dtype=torch.float64, generator=g) + 0.1).requires_grad_()
    tokens, groups, counts = [], [], []
    for begin, size in zip(cu.tolist(), sizes, strict=False):
        part = slice(begin, begin + size)
        found, members = fuse(x[part].detach(), weights[part].tolist() if weighted else [1.0] * size, count)
        tokens += found
        groups += [[begin + t for t in group] for group in members]
        counts.append(len(found))
        assert size == 0 or len(found) == min(size, count)
    out = fc.iterative_fusion(x, count, weights=weights if weighted else None, cu_seqlens=cu)
    assert out.cu_seqlens.diff().tolist() == counts and out.cu_seqlens.dtype == torch.int32
    assert [[r for r in range(53) if out.ids[r] == i] for i in range(len(groups))] == groups
    torch.testing.assert_close(out.values, torch.stack(tokens), rtol=1e-12, atol=1e-12)
    each = [weights[group].sum() if weighted else torch.tensor(float(len(group))).double() for group in groups]
    torch.testing.assert_close(out.sizes, torch.stack(each))
    w = weights if weighted else torch.ones(53, dtype=torch.float64)
    wanted = torch.stack([(w[group, None] * x[group]).sum(0) / w[group].sum() for group in groups])
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=g)
    leaves = (x, weights) if weighted and count < 29 else (x,)  # without a round the weights have no effect
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out.values, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(list(x.detach().split(list(sizes))), True, padding_value=torch.nan)
    padded_weights = pad(list(weights.detach().split(list(sizes))), True, padding_value=torch.nan)
    again = fc.iterative_fusion(
        padded, count, weights=padded_weights if weighted else None, lengths=torch.tensor(sizes)
    )
    assert torch.equal(again.values, out.values) and torch.equal(again.cu_seqlens, out.cu_seqlens)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "merge",
    (
        lambda x, w, **layout: fc.iterative_fusion(x, 4, weights=w, **layout),
        lambda x, w, **layout: fc.bipartite_merge(x, 1.5, size=w, **layout),
        lambda x, w, **layout: fc.bipartite_merge(x, 1.5, window=2, size=w, **layout),
    ),
)
def test_what_is_not_merged_stays_as_it_is(merge, dtype: torch.dtype):
    """A token of one frame is that frame, whatever its weight and the other sequences of the batch."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(33, 6, generator=g).to(dtype)
        weights = torch.where(torch.rand(33, generator=g) < 0.3, 0.0, torch.rand(33, generator=g)).to(dtype)
        cu = torch.tensor([0, 3, 4, 30, 33])
        together = merge(x, weights, cu_seqlens=cu)
        counts = together.ids.bincount()
        single = counts[together.ids] == 1
        assert torch.equal(together.values[together.ids[single]], x[single]) and single.any()
        for i in range(4):
            rows = slice(int(cu[i]), int(cu[i + 1]))
            tokens = slice(int(together.cu_seqlens[i]), int(together.cu_seqlens[i + 1]))
            alone = merge(x[rows], weights[rows])
            assert torch.equal(alone.values, together.values[tokens])
            assert torch.equal(alone.sizes, together.sizes[tokens])
    zero = merge(torch.ones(8, 2, dtype=dtype), torch.zeros(8, dtype=dtype))
    merged = zero.ids.bincount() > 1
    assert merged.any() and torch.equal(zero.values[merged], torch.zeros(int(merged.sum()), 2, dtype=dtype))


def test_frames_with_nan_do_not_affect_others():
    x = features("iid", 12, 4, torch.float64)
    x[5] = torch.nan
    for window in (0, 3, None):
        out = fc.bipartite_merge(x, 2.0, window=window)
        spoiled = out.values.isnan().any(-1)
        assert int(spoiled.sum()) == 1
    assert fc.greedy_segments(x, 0.5).starts.numel() > 1


def test_half_types_and_empty_input():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = features("iid", 20, 4, dtype)
        out = fc.bipartite_merge(x, 2.0, window=None)
        assert out.values.dtype == dtype and out.values.shape == (10, 4)
    empty = fc.bipartite_merge(torch.zeros(0, 3), 2.0)
    assert empty.values.shape == (0, 3) and empty.cu_seqlens.tolist() == [0, 0]
    assert fc.greedy_segments(torch.zeros(2, 0, 3), 0.5).starts.numel() == 0
    for shape in ((0, 3), (2, 0, 3), (0, 4, 3)):
        fused = fc.iterative_fusion(torch.zeros(shape), 2)
        assert fused.values.shape == (0, 3) and not fused.cu_seqlens.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fc.bipartite_merge(x, 0.5), "rate must be at least 1, got 0.5"),
        (lambda x: fc.bipartite_merge(x, 2.0, window=-1), "window must be at least 0, got -1"),
        (lambda x: fc.bipartite_merge(x, 2.0, keys=x[:2]), "keys must have shape [4, 'K'], got [2, 3]"),
        (
            lambda x: fc.bipartite_merge(x, 2.0, size=torch.ones(3)),
            "size must have shape [4], one value per row, got [3]",
        ),
        (lambda x: fc.bipartite_merge(x, 2.0, window=1.5), "window must be an integer, got 1.5"),
        (lambda x: fc.greedy_segments(x, 0.5, max_len=2.5), "max_len must be an integer, got 2.5"),
        (lambda x: fc.iterative_fusion(x, 0), "count must be at least 1, got 0"),
        (lambda x: fc.iterative_fusion(x, 2, weights=torch.ones(3)), "weights must have shape [4], one value per row"),
        (lambda x: fc.greedy_segments(x, 0.5, max_len=0), "max_len must be at least 1, got 0"),
        (lambda x: fc.greedy_segments(x, 0.5, cu_seqlens=torch.tensor([0, 9])), "cu_seqlens"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.randn(4, 3))
