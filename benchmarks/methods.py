"""Published methods against the form in which they are published: a loop, or tensor operations, in PyTorch.

Every form takes the same batch and gives the tokens of all sequences, one after the other. Ours is held to the form
next to it before either is timed: as many tokens, values equal to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from benchmarks.cases import buffer_count, cu_seqlens, features, random_lengths
from benchmarks.checks import WrongResult
from benchmarks.timing import Disturbance, Samples, interleave

OURS = "fastcompress"
#: A CTC head's units, the blank first.
UNITS = 40


@dataclass(frozen=True)
class MethodCase:
    """Frames of each sequence, and their width."""

    name: str
    lengths: tuple[int, ...]
    dim: int

    @property
    def few(self) -> int:
        """A number of tokens that takes a few halvings."""
        return max(self.lengths) // 7


CASE = MethodCase("8 clips", random_lengths(8, 1350, 1500, seed=5), 1280)
QUICK = MethodCase("quick", random_lengths(3, 60, 90, seed=5), 128)


@dataclass(frozen=True)
class Batch:
    """A batch as the forms take it.

    Attributes:
        x: ``[N, D]``; ``cu_seqlens`` ``[B + 1]`` int32.
        alpha: ``[N]`` fp32, weights of integrate-and-fire that fire every third frame or so; below 1.
        labels: ``[N]`` int64, of a CTC head: runs of a few frames.
    """

    case: MethodCase
    x: Tensor
    cu_seqlens: Tensor
    alpha: Tensor
    labels: Tensor

    def parts(self) -> list[Tensor]:
        """The frames of each sequence."""
        return list(self.x.split(list(self.case.lengths)))


def batches(case: MethodCase, dtype: torch.dtype, last_level_cache: int) -> list[Batch]:
    """Equal values in different memory, to rotate through."""
    g = torch.Generator().manual_seed(1)
    count = sum(case.lengths)
    x = features(count, case.dim, dtype)
    alpha = 0.66 * torch.rand(count, generator=g)
    runs = torch.randint(1, 6, (count,), generator=g)
    labels = torch.randint(0, UNITS, (count,), generator=g).repeat_interleave(runs)[:count]
    first = Batch(case, x, cu_seqlens(case.lengths), alpha, labels)
    copies = buffer_count(x.nbytes, last_level_cache) - 1
    return [first, *(Batch(**(vars(first) | {"x": x.clone()})) for _ in range(copies))]


# --- what the published forms share ----------------------------------------------------------------------------------


def cosines(x: Tensor) -> Tensor:
    """``[T - 1]`` fp32, of neighbours."""
    x = x.float()
    return F.cosine_similarity(x[:-1], x[1:], dim=-1)


def means(x: Tensor, starts: Sequence[int]) -> Tensor:
    """Of the segments that begin there, one after the other. By ``split``, whose backward is one concatenation: that of
    a slice is as large as the sequence, for each segment."""
    sizes = [b - a for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]
    return torch.stack([segment.mean(0) for segment in x.split(sizes)])


def each(form: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    """A form of one sequence, for sequence after sequence."""
    return lambda batch: torch.cat([form(part) for part in batch.parts()])


# --- integrate-and-fire ----------------------------------------------------------------------------------------------


def fire(batch: Batch) -> Tensor:
    return fc.integrate_and_fire(batch.x, batch.alpha, cu_seqlens=batch.cu_seqlens, tail=None).values


def _padded(batch: Batch) -> tuple[Tensor, Tensor]:
    lengths = list(batch.case.lengths)
    return pad_sequence(batch.parts(), True), pad_sequence(list(batch.alpha.split(lengths)), True).double()


def fire_by_scatter(batch: Batch) -> Tensor:
    """As torch_cif: each frame is added to the token that is open before it and to the one that is open behind it.

    Sums of weights in fp64, for the same tokens; no frame fires twice here, so that its loop over further ones is gone.
    """
    x, alpha = _padded(batch)
    sums = alpha.cumsum(1)
    right = sums.floor().long()
    left = right.roll(1, 1)
    left[:, 0] = 0
    counts = right[:, -1]
    over = torch.where(right > left, sums - right, 0.0)
    out = x.new_zeros(x.shape[0], int(counts.max()) + 1, x.shape[2], dtype=torch.float32)
    out = out.scatter_add(1, left[..., None].expand(x.shape), (alpha - over).float()[..., None] * x)
    out = out.scatter_add(1, right[..., None].expand(x.shape), over.float()[..., None] * x)
    return torch.cat([row[:n] for row, n in zip(out, counts.tolist(), strict=True)]).to(x.dtype)


def fire_by_loop(batch: Batch) -> Tensor:
    """As FunASR: frame after frame, all sequences at once. By ``unbind``, as in :func:`means`."""
    x, alpha = _padded(batch)
    columns = x.unbind(1)
    filled, frame = alpha.new_zeros(len(x)), x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    frames, fires = [], []
    for t in range(x.shape[1]):
        room = 1.0 - filled
        filled = filled + alpha[:, t]
        fires.append(filled >= 1.0)
        now = torch.where(fires[-1], room, alpha[:, t])
        frame = frame + now.float()[:, None] * columns[t]
        frames.append(frame)
        filled = torch.where(fires[-1], filled - 1.0, filled)
        frame = torch.where(fires[-1][:, None], (alpha[:, t] - now).float()[:, None] * columns[t], frame)
    return torch.stack(frames, 1)[torch.stack(fires, 1)].to(x.dtype)


# --- merging ---------------------------------------------------------------------------------------------------------


def greedy(batch: Batch) -> Tensor:
    segments = fc.greedy_segments(batch.x, 0.5, cu_seqlens=batch.cu_seqlens)
    return fc.segment_reduce(batch.x, segments)


def greedy_by_loop(x: Tensor) -> Tensor:
    """As SA-MAP: frame after frame against the members of the open group."""
    unit = F.normalize(x.float(), dim=-1)
    starts = [0]
    for t in range(1, len(x)):
        if not bool((unit[starts[-1] : t] @ unit[t]).mean() >= 0.5):
            starts.append(t)
    return means(x, starts)


def adjacent_merge(batch: Batch) -> Tensor:
    return fc.bipartite_merge(batch.x, 1.6, cu_seqlens=batch.cu_seqlens).values


def adjacent_merge_published(x: Tensor) -> Tensor:
    """As A-ToMe: the most similar pairs of an even and the next odd frame."""
    order = cosines(x)[::2].argsort(descending=True, stable=True)
    merged = order[: len(x) - _kept(len(x), 1.6)]
    total = x.float()
    count = x.new_ones(len(x), dtype=torch.float32)
    total = total.index_add(0, 2 * merged + 1, x[2 * merged].float())
    count = count.index_add(0, 2 * merged + 1, torch.ones(len(merged)))
    stays = torch.ones(len(x), dtype=torch.bool).index_fill(0, 2 * merged, False)
    return (total[stays] / count[stays, None]).to(x.dtype)


def _kept(length: int, rate: float) -> int:
    return -int(-length // rate)


def anywhere(batch: Batch) -> Tensor:
    return fc.bipartite_merge(batch.x, 2.0, window=None, cu_seqlens=batch.cu_seqlens).values


def anywhere_published(x: Tensor) -> Tensor:
    """As ToMe: each even frame's best odd one; tokens put back in order."""
    unit = F.normalize(x.float(), dim=-1)
    best, partner = (unit[::2] @ unit[1::2].T).max(1)
    merged = best.argsort(descending=True, stable=True)[: len(x) - _kept(len(x), 2.0)]
    target = 2 * partner[merged] + 1
    total = x.float().index_add(0, target, x[2 * merged].float())
    count = x.new_ones(len(x), dtype=torch.float32).index_add(0, target, torch.ones(len(merged)))
    stays = torch.ones(len(x), dtype=torch.bool).index_fill(0, 2 * merged, False)
    return (total[stays] / count[stays, None]).to(x.dtype)


# --- rules -----------------------------------------------------------------------------------------------------------


def pool(rule: str) -> Callable[[Batch], Tensor]:
    return lambda batch: fc.segment_pool(batch.x, cu_seqlens=batch.cu_seqlens, rule=rule).values


def top_k_published(x: Tensor) -> Tensor:
    """As FastAdaSP: the most similar neighbours are merged, chains of them into one."""
    keep = _kept(len(x), 3.0)
    merged = cosines(x).argsort(descending=True, stable=True)[: len(x) - keep]
    starts = torch.ones(len(x), dtype=torch.bool).index_fill(0, merged + 1, False)
    ids = starts.long().cumsum(0) - 1
    total = x.new_zeros(keep, x.shape[1], dtype=torch.float32).index_add(0, ids, x.float())
    return (total / torch.bincount(ids, minlength=keep)[:, None]).to(x.dtype)


def lookback_published(x: Tensor) -> Tensor:
    """As Affinity Pooling: the last three members of the open group."""
    near = [(1 - F.cosine_similarity(x[:-lag].float(), x[lag:].float()) <= 0.5).tolist() for lag in (1, 2, 3)]
    starts = [0]
    for t in range(1, len(x)):
        if not any(near[lag - 1][t - lag] for lag in range(1, min(3, t - starts[-1]) + 1)):
            starts.append(t)
    return means(x, starts)


def label_change(batch: Batch) -> Tensor:
    rule = fc.LabelChange()
    return fc.segment_pool(batch.x, cu_seqlens=batch.cu_seqlens, rule=rule, labels=batch.labels).values


def label_change_published(batch: Batch) -> Tensor:
    """As CTC compression: a matrix of weights for each sequence, and a batched product."""
    lengths = list(batch.case.lengths)
    runs = [[len(list(run)) for _, run in itertools.groupby(row.tolist())] for row in batch.labels.split(lengths)]
    x = pad_sequence(batch.parts(), True)
    weights = x.new_zeros(len(x), max(map(len, runs)), x.shape[1])
    for b, sizes in enumerate(runs):
        begin = 0
        for i, size in enumerate(sizes):
            weights[b, i, begin : begin + size] = 1.0 / size
            begin += size
    out = torch.bmm(weights, x)
    return torch.cat([row[: len(sizes)] for row, sizes in zip(out, runs, strict=True)])


def fusion(batch: Batch) -> Tensor:
    return fc.iterative_fusion(batch.x, batch.case.few, weights=batch.alpha, cu_seqlens=batch.cu_seqlens).values


def fusion_published(batch: Batch) -> Tensor:
    """As FastLongSpeech: rounds of the most similar neighbours, sequence after sequence, weights carried along."""
    tokens = []
    for x, weight in zip(batch.parts(), batch.alpha.split(list(batch.case.lengths)), strict=True):
        while len(x) > batch.case.few:
            keep = max(-(-len(x) // 2), batch.case.few)
            merged = cosines(x).argsort(descending=True, stable=True)[: len(x) - keep]
            ids = torch.ones(len(x), dtype=torch.long).index_fill(0, merged + 1, 0).cumsum(0) - 1
            total = x.new_zeros(keep, x.shape[1], dtype=torch.float32).index_add(0, ids, x.float() * weight[:, None])
            weight = weight.new_zeros(keep).index_add(0, ids, weight)
            x = (total / weight[:, None]).to(x.dtype)
        tokens.append(x)
    return torch.cat(tokens)


@dataclass(frozen=True)
class Method:
    """A method: our line, and how it is published; the first form is what ours is held to."""

    name: str
    ours: Callable[[Batch], Tensor]
    published: dict[str, Callable[[Batch], Tensor]]


METHODS = (
    Method("CIF", fire, {"scatter_add, padded": fire_by_scatter, "loop over frames": fire_by_loop}),
    Method("SA-MAP's merge", greedy, {"loop over frames": each(greedy_by_loop)}),
    Method("A-ToMe", adjacent_merge, {"per sequence": each(adjacent_merge_published)}),
    Method("ToMe", anywhere, {"per sequence": each(anywhere_published)}),
    Method("FastAdaSP", pool("top-k:rate=3"), {"per sequence": each(top_k_published)}),
    Method("FastLongSpeech", fusion, {"per sequence": fusion_published}),
    Method("Affinity Pooling", pool("lookback:3,threshold=0.5"), {"loop over frames": each(lookback_published)}),
    Method("CTC compression", label_change, {"bmm, padded": label_change_published}),
)


def check(name: str, found: Tensor, wanted: Tensor) -> None:
    """Raises :class:`WrongResult` unless both are the same tokens to rounding, but for one in a thousand whose scores
    rounding moved."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}[found.dtype]
    if found.dtype != wanted.dtype or abs(len(found) - len(wanted)) > len(wanted) / 1000:
        raise WrongResult(f"{name}: {len(found)} tokens of {found.dtype} for {len(wanted)} of {wanted.dtype}")
    scale = wanted.float().abs().mean()
    if len(found) == len(wanted):
        wrong = ((found.float() - wanted.float()).abs() > tolerance * (wanted.float().abs() + scale)).any(1)
        if int(wrong.sum()) > len(wanted) / 1000:
            raise WrongResult(f"{name}: {int(wrong.sum())} of {len(wanted)} tokens differ by more than rounding")


@dataclass(frozen=True)
class MethodTable:
    """Times of a call in seconds, of each form."""

    case: MethodCase
    method: str
    dtype: str
    threads: int
    direction: str
    tokens: int
    samples: dict[str, Samples]
    disturbance: Disturbance


def measure(
    case: MethodCase, dtype: torch.dtype, threads: int, reps: int, last_level_cache: int, tries: int
) -> list[MethodTable]:
    """Forward, and forward with the gradient of the frames, of every method.

    Raises:
        WrongResult: ours gives other tokens than the published form, or a form other gradients.
    """
    torch.set_num_threads(threads)
    inputs = batches(case, dtype, last_level_cache)
    leaves = [Batch(**(vars(b) | {"x": b.x.detach().requires_grad_()})) for b in inputs]
    tables = []
    for method in METHODS:
        forms = {OURS: method.ours, **method.published}
        with torch.no_grad():
            results = {name: form(inputs[0]) for name, form in forms.items()}
        for name in method.published:
            check(f"{method.name}, {name}", results[OURS], results[name])
        grad = torch.randn_like(results[OURS])

        def forward(form: Callable[[Batch], Tensor]) -> Callable[[int], Any]:
            return lambda i: form(inputs[i % len(inputs)])

        def both(form: Callable[[Batch], Tensor], grad: Tensor = grad) -> Callable[[int], Any]:
            def call(i: int) -> Any:
                batch = leaves[i % len(leaves)]
                out = form(batch)
                return out, torch.autograd.grad(out, batch.x, grad[: len(out)])[0]

            return call

        size = inputs[0].x.nbytes
        for direction, make in (("forward", forward), ("forward+backward", both)):
            with torch.set_grad_enabled(direction != "forward"):
                functions = {name: make(form) for name, form in forms.items()}
                samples, disturbance = interleave(functions, reps, max_seconds=2.0, tries=tries, recall=2 * size)
            name = str(dtype).removeprefix("torch.")
            tokens = len(results[OURS])
            tables.append(MethodTable(case, method.name, name, threads, direction, tokens, samples, disturbance))
    return tables


def rows(tables: Sequence[MethodTable]) -> list[Sequence[str]]:
    """For ``report.align``: a line for each form of each method."""
    lines: list[Sequence[str]] = [["", "form", "tokens", "ms", "p10", "p90", "reps", "x ours"]]
    for table in tables:
        for name, sample in table.samples.items():
            times = [f"{seconds * 1e3:.2f}" for seconds in (sample.median, sample.p10, sample.p90)]
            multiple = f"{sample.median / table.samples[OURS].median:.2f}"
            first = (table.method, str(table.tokens)) if name == OURS else ("", "")
            lines.append([first[0], name, first[1], *times, str(len(sample.seconds)), multiple])
    return lines
