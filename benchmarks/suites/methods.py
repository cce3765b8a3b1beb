"""Suite ``methods``: published methods against the forms in which they are published.

Every form takes the same batch and returns the tokens of all sequences, one after the other. Before anything is timed,
the number of tokens must agree, and their values to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import cu_seqlens, features, gradients, random_lengths
from benchmarks.harness.compare import Bench, Contender, Job, WrongResult, compare
from benchmarks.measurement import OURS
from benchmarks.suites import published
from benchmarks.suites.published import Batch, MethodCase, each

NAME = "methods"
#: Units of a CTC head, the blank first.
UNITS = 40
PROMINENCE = "local-max:prominence=0.1,normalize=True"
CASE = MethodCase("8 clips", random_lengths(8, 1350, 1500, seed=5), 1280)
QUICK = MethodCase("quick", random_lengths(3, 60, 90, seed=5), 128)


def batch(case: MethodCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """Make a batch, the same for the same arguments."""
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
    x, cu, alpha, labels, blank = (t.to(device) for t in (x, cu_seqlens(case.lengths), alpha, labels, blank))
    return Batch(case, x, cu, alpha, labels, blank, router.to(device, dtype))


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
    """A published method.

    Attributes:
        ours: Our line.
        published: The forms in which it is published.
        needs: A package that those need.
    """

    name: str
    ours: Callable[[Batch], Tensor]
    published: dict[str, Callable[[Batch], Tensor]]
    needs: str | None = None

    def contenders(self) -> list[Contender]:
        """Ours first."""
        theirs = self.published.items()
        return [
            Contender(OURS, OURS, lambda: self.ours),
            *(Contender(name, "published", lambda form=form: form, module=self.needs) for name, form in theirs),  # type: ignore[misc]  # a default
        ]


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
    """Check that both are the same tokens to rounding, but for one in a thousand whose scores rounding moved.

    Raises:
        WrongResult: They are not.
    """
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}[found.dtype]
    if found.dtype != wanted.dtype or abs(len(found) - len(wanted)) > len(wanted) / 1000:
        raise WrongResult(f"{name}: {len(found)} tokens of {found.dtype} for {len(wanted)} of {wanted.dtype}")
    scale = wanted.float().abs().mean()
    if len(found) == len(wanted):
        wrong = ((found.float() - wanted.float()).abs() > tolerance * (wanted.float().abs() + scale)).any(1)
        if int(wrong.sum()) > len(wanted) / 1000:
            raise WrongResult(f"{name}: {int(wrong.sum())} of {len(wanted)} tokens differ by more than rounding")


@dataclass
class MethodJob(Job):
    """One method. The tokens and the gradients of the library are what the published forms are compared with."""

    tokens: Tensor | None = None
    grad_x: Tensor | None = None

    def check(
        self, name: str, batch: Any, result: Tensor, grad: Tensor | None, grad_x: Tensor | None
    ) -> dict[str, Any]:
        if self.tokens is None:
            self.tokens = result
            self.details["tokens"] = len(result)
        check(name, result, self.tokens)
        if grad_x is not None and self.grad_x is None:
            self.grad_x = grad_x
        if grad_x is not None and self.grad_x is not None and len(result) == len(self.tokens):
            check(f"{name}, gradient", grad_x, self.grad_x)
        return {}


def job(bench: Bench, case: MethodCase, method: Method, batches: list[Batch], dtype: torch.dtype, threads: int) -> Job:
    """The job of one setting; a published form that differs from ours stops the suite, since either may be wrong."""
    size = batches[0].x.nbytes
    return MethodJob(
        NAME, method.name, dtype, threads, method.contenders(), batches,
        grads=gradients(batches[0].x.numel(), dtype, 1, bench.device), strict=True, recall=2 * size, reps=7,
        max_seconds=2.0, details={"batch": case.name, "lengths": case.lengths, "dim": case.dim},
    )  # fmt: skip


def run(bench: Bench) -> None:
    """Measure every method."""
    bench = replace(bench, tries=min(bench.tries, 2))  # loops take seconds per call
    case = QUICK if bench.quick or bench.dry else CASE
    for dtype, threads in bench.settings():
        if not bench.on_gpu:
            torch.set_num_threads(threads)
        first = batch(case, dtype, bench.device)
        batches = [first] if bench.on_gpu else first.rotation(bench.cache)
        for method in METHODS:
            compare(bench, job(bench, case, method, batches, dtype, threads))
