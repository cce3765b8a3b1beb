"""Published methods against the form in which they are published (:mod:`benchmarks.published`).

Every form takes the same batch and gives the tokens of all sequences, one after the other. Ours is held to the form
next to it before either is timed: as many tokens, values equal to rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import buffer_count, cu_seqlens, features, random_lengths
from benchmarks.harness.clock import Disturbance, Samples, interleave
from benchmarks.suites import published
from benchmarks.suites.checks import WrongResult
from benchmarks.suites.published import Batch, MethodCase, each

OURS = "fastcompress"
#: A CTC head's units, the blank first.
UNITS = 40
PROMINENCE = "local-max:prominence=0.1,normalize=True"
CASE = MethodCase("8 clips", random_lengths(8, 1350, 1500, seed=5), 1280)
QUICK = MethodCase("quick", random_lengths(3, 60, 90, seed=5), 128)


def batches(case: MethodCase, dtype: torch.dtype, last_level_cache: int) -> list[Batch]:
    """Equal values in different memory, to rotate through."""
    g = torch.Generator().manual_seed(1)
    count = sum(case.lengths)
    x = features(count, case.dim, dtype)
    alpha = 0.66 * torch.rand(count, generator=g)
    runs = torch.randint(1, 6, (count,), generator=g)
    labels = torch.randint(0, UNITS, (count,), generator=g).repeat_interleave(runs)[:count]
    blank = torch.where(torch.rand(count, generator=g) < 2 / 3, 0.95, 0.1)
    router = fc.nn.LearnedBoundary(case.dim, reduce="first").requires_grad_(False)
    for projection in (router.query, router.key):
        projection.weight.normal_(std=case.dim**-0.5, generator=g)
    first = Batch(case, x, cu_seqlens(case.lengths), alpha, labels, blank, router.to(dtype))
    copies = buffer_count(x.nbytes, last_level_cache) - 1
    return [first, *(Batch(**(vars(first) | {"x": x.clone()})) for _ in range(copies))]


def fire(batch: Batch) -> Tensor:
    return fc.integrate_and_fire(batch.x, batch.alpha, cu_seqlens=batch.cu_seqlens, tail=None).values


def greedy(batch: Batch) -> Tensor:
    segments = fc.greedy_segments(batch.x, 0.5, cu_seqlens=batch.cu_seqlens)
    return fc.segment_reduce(batch.x, segments)


def adjacent_merge(batch: Batch) -> Tensor:
    return fc.bipartite_merge(batch.x, 1.6, cu_seqlens=batch.cu_seqlens).values


def merge(window: int | None) -> Callable[[Batch], Tensor]:
    return lambda batch: fc.bipartite_merge(batch.x, 2.0, window=window, cu_seqlens=batch.cu_seqlens).values


def pool(rule: str) -> Callable[[Batch], Tensor]:
    return lambda batch: fc.segment_pool(batch.x, cu_seqlens=batch.cu_seqlens, rule=rule).values


def novelty(batch: Batch) -> Tensor:
    tokens: Tensor = fc.nn.NoveltyPool(0.2)(batch.x, cu_seqlens=batch.cu_seqlens).values
    return tokens


def route(batch: Batch) -> Tensor:
    tokens: Tensor = batch.router(batch.x, cu_seqlens=batch.cu_seqlens).values
    return tokens


def label_change(batch: Batch, weights: Tensor | None = None) -> Tensor:
    rule = fc.LabelChange()
    pooled = fc.segment_pool(batch.x, cu_seqlens=batch.cu_seqlens, rule=rule, labels=batch.labels, weights=weights)
    return pooled.values


def weighted_label_change(batch: Batch) -> Tensor:
    return label_change(batch, batch.alpha)


def keep_speech(batch: Batch) -> Tensor:
    groups = torch.where(batch.blank > 0.9, -1, 1).int()
    return fc.segment_pool(batch.x, cu_seqlens=batch.cu_seqlens, rule="uniform:1", row_group=groups).values


def fusion(batch: Batch) -> Tensor:
    return fc.iterative_fusion(batch.x, batch.case.few, weights=batch.alpha, cu_seqlens=batch.cu_seqlens).values


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        ours: our line.
        published: how it is published; ours is held to each.
        needs: a package without which the method is left out.
    """

    name: str
    ours: Callable[[Batch], Tensor]
    published: dict[str, Callable[[Batch], Tensor]]
    needs: str | None = None

    @property
    def available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


METHODS = (
    Method("CIF", fire, {"scatter_add, padded": published.fire_by_scatter, "loop over frames": published.fire_by_loop}),
    Method("SA-MAP's merge", greedy, {"loop over frames": each(published.greedy_by_loop)}),
    Method("A-ToMe", adjacent_merge, {"per sequence": each(published.adjacent_merge)}),
    Method("ToMe", merge(None), {"per sequence": each(published.anywhere)}),
    Method("LTBM", merge(5), {"per sequence": each(published.nearby)}),
    Method("FastAdaSP", pool("top-k:rate=3"), {"per sequence": each(published.top_k)}),
    Method("FastLongSpeech", fusion, {"per sequence": published.fusion}),
    Method("Affinity Pooling", pool("lookback:3,threshold=0.5"), {"loop over frames": each(published.lookback)}),
    Method("AdaTS", novelty, {"loop over frames": each(published.novelty)}),
    Method("UnsupSeg", pool(PROMINENCE), {"per sequence": each(published.prominent_peaks)}, needs="scipy"),
    Method("Segmental CPC", pool("peak-height:0.04"), {"per sequence": each(published.high_peaks)}),
    Method("H-Net's router", route, {"packed": published.route}),
    Method("CTC compression", label_change, {"bmm, padded": published.label_change}),
    Method("CTC compression, weighted", weighted_label_change, {"bmm, padded": published.weighted_label_change}),
    Method("blank removal", keep_speech, {"per sequence": published.speech}),
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
        if not method.available:
            print(f"no {method.name}: {method.needs} is not installed")
            continue
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
