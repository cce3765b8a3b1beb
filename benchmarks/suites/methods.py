"""Suite ``methods``: published methods against the forms in which they are published.

Every form takes the same batch and returns the tokens of all sequences, one after the other. Before anything is timed,
the number of tokens must agree, and their values to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastcompress as fc
from benchmarks.harness.cases import cu_seqlens, features, gradients, random_lengths
from benchmarks.harness.compare import Bench, Check, Implementation, Job, WrongResult, compare
from benchmarks.results import OURS
from benchmarks.suites import published
from benchmarks.suites.published import Batch, each

NAME = "methods"
#: Units of a CTC head, the blank first.
UNITS = 40
#: Name of the batch, frames of each sequence, and their width.
CASE = ("8 clips", random_lengths(8, 1350, 1500, seed=5), 1280)
QUICK = ("quick", random_lengths(3, 60, 90, seed=5), 128)

Form = Callable[[Tensor, Batch], Tensor]


def batch_of(
    lengths: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Batch]:
    """Make frames and the rest of their batch, the same for the same arguments."""
    g = torch.Generator().manual_seed(1)
    count = sum(lengths)
    x = features(count, dim, dtype)
    alpha = 0.66 * torch.rand(count, generator=g)
    runs = torch.randint(1, 6, (count,), generator=g)
    labels = torch.randint(0, UNITS, (count,), generator=g).repeat_interleave(runs)[:count]
    blank = torch.where(torch.rand(count, generator=g) < 2 / 3, 0.95, 0.1)
    router = fc.nn.LearnedBoundary(dim, reduce="first").requires_grad_(False)
    for projection in (router.query, router.key):
        projection.weight.normal_(std=dim**-0.5, generator=g)
    cu, alpha, labels, blank = (t.to(device) for t in (cu_seqlens(lengths), alpha, labels, blank))
    return x.to(device), Batch(list(lengths), cu, alpha, labels, blank, router.to(device, dtype))


def pool(rule: str | fc.Rule, labels: bool = False, weighted: bool = False) -> Form:
    """Return ``segment_pool`` by a rule, which may need labels."""

    def form(x: Tensor, batch: Batch) -> Tensor:
        given = batch.labels if labels else None
        weights = batch.alpha if weighted else None
        return fc.segment_pool(x, cu_seqlens=batch.cu_seqlens, rule=rule, labels=given, weights=weights).values

    return form


def merge(rate: float, window: int | None) -> Form:
    """Return ``bipartite_merge`` at a rate."""
    return lambda x, batch: fc.bipartite_merge(x, rate, window=window, cu_seqlens=batch.cu_seqlens).values


def fire(x: Tensor, batch: Batch) -> Tensor:
    """``integrate_and_fire``."""
    return fc.integrate_and_fire(x, batch.alpha, cu_seqlens=batch.cu_seqlens, tail=None).values


def greedy(x: Tensor, batch: Batch) -> Tensor:
    """``greedy_segments``, pooled."""
    return fc.segment_reduce(x, fc.greedy_segments(x, 0.5, cu_seqlens=batch.cu_seqlens))


def keep_speech(x: Tensor, batch: Batch) -> Tensor:
    """``segment_pool``, which drops the rows of group -1."""
    groups = torch.where(batch.blank > 0.9, -1, 1).int()
    return fc.segment_pool(x, cu_seqlens=batch.cu_seqlens, rule="uniform:1", row_group=groups).values


def fusion(x: Tensor, batch: Batch) -> Tensor:
    """``iterative_fusion``."""
    return fc.iterative_fusion(x, batch.few, weights=batch.alpha, cu_seqlens=batch.cu_seqlens).values


SEQUENCES, FRAMES = "per sequence", "loop over frames"
PROMINENT = "local-max:prominence=0.1,normalize=True"
BMM = "bmm, padded"
#: Our form of each method, and the forms in which it is published.
METHODS: dict[str, tuple[Form, dict[str, Form]]] = {
    "CIF": (fire, {"scatter_add, padded": published.fire_by_scatter, FRAMES: published.fire_by_loop}),
    "SA-MAP's merge": (greedy, {FRAMES: each(published.greedy_by_loop)}),
    "A-ToMe": (merge(1.6, 0), {SEQUENCES: each(published.adjacent_merge)}),
    "ToMe": (merge(2.0, None), {SEQUENCES: each(published.anywhere)}),
    "LTBM": (merge(2.0, 5), {SEQUENCES: each(published.nearby)}),
    "FastAdaSP": (pool("top-k:rate=3"), {SEQUENCES: each(published.top_k)}),
    "FastLongSpeech": (fusion, {SEQUENCES: published.fusion}),
    "Affinity Pooling": (pool("lookback:3,threshold=0.5"), {FRAMES: each(published.lookback)}),
    "AdaTS": (
        lambda x, batch: fc.nn.NoveltyPool(0.2)(x, cu_seqlens=batch.cu_seqlens).values,
        {FRAMES: each(published.novelty)},
    ),
    "UnsupSeg": (pool(PROMINENT), {SEQUENCES: each(published.prominent_peaks)}),
    "Segmental CPC": (pool("peak-height:0.04"), {SEQUENCES: each(published.high_peaks)}),
    "minimum variance": (pool("min-variance:rate=3"), {SEQUENCES: each(published.least_variance)}),
    "H-Net's router": (
        lambda x, batch: batch.router(x, cu_seqlens=batch.cu_seqlens).values,
        {"packed": published.route},
    ),
    "CTC compression": (
        pool(fc.LabelChange(), labels=True),
        {BMM: functools.partial(published.label_change, weighted=False)},
    ),
    "CTC compression, weighted": (
        pool(fc.LabelChange(), labels=True, weighted=True),
        {BMM: functools.partial(published.label_change, weighted=True)},
    ),
    "blank removal": (keep_speech, {SEQUENCES: published.speech}),
}


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


def checks() -> Check:
    """Return a check of one method: the others must return what the library returns, which comes first."""
    first: dict[str, Tensor] = {}

    def check_both(name: str, x: Any, result: Tensor, grad: Any, grad_x: Tensor | None) -> dict[str, Any]:
        check(name, result, first.setdefault("tokens", result))
        if grad_x is not None and len(result) == len(first["tokens"]):
            check(f"{name}, gradient", grad_x, first.setdefault("gradient", grad_x))
        return {"tokens": len(first["tokens"])}

    return check_both


def jobs(bench: Bench, name: str, lengths: Sequence[int], dim: int, dtype: torch.dtype, threads: int) -> Iterator[Job]:
    """Make the jobs of one setting; a form that differs from ours stops the suite, since either may be wrong."""
    x, batch = batch_of(lengths, dim, dtype, bench.device)
    xs, grads = bench.rotation(x), gradients(x.numel(), dtype, 1, bench.device)
    for method, (ours, forms) in METHODS.items():
        module = "scipy" if method == "UnsupSeg" else None
        theirs = [Implementation(form, "published", call, module=module) for form, call in forms.items()]
        yield Job(
            NAME, method, dtype, threads, [Implementation(OURS, OURS, ours), *theirs], checks(), xs, batch, grads=grads,
            strict=True, recall=2 * x.nbytes, reps=7, max_seconds=2.0,
            details={"batch": name, "lengths": lengths, "dim": dim},
        )  # fmt: skip


def run(bench: Bench) -> None:
    """Measure every method."""
    bench = replace(bench, tries=min(bench.tries, 2))  # loops take seconds per call
    for dtype, threads in bench.settings():
        for job in jobs(bench, *(QUICK if bench.quick or bench.dry else CASE), dtype, threads):
            compare(bench, job)
