"""Suite ``segment_pool``: local maxima against the same job in PyTorch, compiled and eager, and in other libraries."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcompress as fc
from benchmarks.harness.bandwidth_bound import KINDS, BandwidthBound
from benchmarks.harness.cases import Case, batch_of, gradients, random_lengths
from benchmarks.harness.compare import TRITON, Bench, Implementation, Job, compare
from benchmarks.results import BOTH, FORWARD, OURS
from benchmarks.suites import compiled, eager
from benchmarks.suites.checks import Expected, check_average_pool
from benchmarks.suites.eager import Tokens

NAME = "segment_pool"
AVERAGE_POOL = "AvgPool1d, padded, less work"
#: Our other rule, whose segments are checked against its own definition.
MIN_VARIANCE = "fastcompress, min-variance, more work"
#: Most bytes of new memory that are made ready before a sample.
_MAX_RECALL = 2 << 30
#: Gradients to rotate through.
_GRADIENTS = 8
#: Packages of other libraries, by the pooling that needs them.
_MODULES = {"segment_csr": "torch_scatter", "jagged": "fbgemm_gpu"}
#: Scores with each pooling.
_EAGER = (
    *itertools.product(("cosine", "bmm"), ("embedding_bag", "scatter_reduce", "index_add")),
    ("blocked", "embedding_bag"),
    *itertools.product(("cosine", "bmm"), ("segment_csr",)),
    ("bmm", "jagged"),
)


def _eager(scores: str, pool: str) -> Implementation:
    form = eager.vectorised(getattr(eager, scores), getattr(eager, pool))
    module = _MODULES.get(pool)
    return Implementation(f"{scores} + {pool}", "library" if module else "eager", form, module=module)


def _compiled(group: str, **how: Any) -> list[Implementation]:
    forms = {
        "plain": functools.partial(compiled.plain, **how),
        "tuned + gather": functools.partial(compiled.tuned, gather=True, **how),
        "tuned + embedding_bag": functools.partial(compiled.tuned, gather=False, **how),
    }
    return [Implementation(f"{group}, {name}", group, form) for name, form in forms.items()]


def ours(name: str, form: Callable[..., Any], bench: Bench | None = None) -> list[Implementation]:
    """Return the library; on a GPU with a form for a CUDA graph, next to Triton's kernels."""
    if bench is None or not bench.on_gpu:
        return [Implementation(name, OURS, form)]
    found = [Implementation(name, OURS, form, functools.partial(form, compact=False), None if bench.dry else "cuda")]
    if not bench.dry or os.environ.get("TRITON_INTERPRET") == "1":
        bound = functools.partial(form, compact=False)
        found.append(Implementation(f"{name}, triton", TRITON, form, bound, "triton", module="triton"))
    return found


def implementations(bench: Bench | None = None) -> list[Implementation]:
    """List the implementations, ours first; on a GPU without the Python loop and with ``max-autotune``."""
    rest = [_eager(scores, pool) for scores, pool in _EAGER]
    rest.append(Implementation(AVERAGE_POOL, "less work", eager.average_pool, padded=True))
    if bench is None or not bench.on_gpu:
        rest += [*_compiled("compile"), Implementation("loop, split", "loop", eager.loop)]
    else:
        rest += _compiled("compile", **({"backend": "aot_eager"} if bench.dry else {}))
        rest += _compiled("max-autotune", **({"backend": "aot_eager"} if bench.dry else {"mode": "max-autotune"}))
    rest.append(Implementation(MIN_VARIANCE, "more work", eager.min_variance))
    return ours(OURS, eager.fastcompress_pool, bench) + rest


def uniform_implementations(bench: Bench) -> list[Implementation]:
    """List the implementations for windows of one size, ours first."""
    how: dict[str, Any] = {"backend": "aot_eager"} if bench.dry else {}
    rest = [
        Implementation("mean_pooling of flash-linear-attention", "library", eager.mean_pooling, module="fla"),
        Implementation("segment_csr", "library", eager.windows(eager.segment_csr), module="torch_scatter"),
        Implementation("embedding_bag", "eager", eager.windows(eager.embedding_bag)),
        Implementation("index_add", "eager", eager.windows(eager.index_add)),
        Implementation("compile, index_add", "compile", functools.partial(compiled.windows, **how)),
    ]
    return ours(OURS, eager.fastcompress_pool, bench) + rest


_FEW = (OURS, "compile, plain", "cosine + index_add", "bmm + embedding_bag", "loop, split")
CASES: tuple[Case, ...] = (
    Case("S1", random_lengths(8, 1350, 1500, seed=5), 1280),
    Case("S2", random_lengths(32, 200, 1500, seed=5), 1280),
    Case("clip", (1500,), 1280),
    Case("tiny", (8,), 64, calls=500, implementations=_FEW),
)
QUICK = Case(
    "quick", random_lengths(4, 300, 400, seed=5), 1280,
    implementations=(*_FEW, "bmm + segment_csr", "bmm + jagged", "blocked + embedding_bag", AVERAGE_POOL),
)  # fmt: skip
#: The fifth is one hour at 25 Hz.
_GPU_SHAPES = (
    (1, 750, 1280), (8, 750, 1280), (32, 750, 1280), (32, 1500, 1280), (1, 90_000, 1280), (32, 1500, 3584)
)  # fmt: skip
GPU_CASES = tuple(Case(f"{n} x {frames} x {dim}", (frames,) * n, dim) for n, frames, dim in _GPU_SHAPES)
DRY = Case("2 x 60 x 48", (60, 60), 48)
#: Windows of one size, for which other libraries have kernels; flash-linear-attention needs a power of two.
UNIFORM = Case("uniform, 32 x 1500 x 1280", (1500,) * 32, 1280, rule=fc.Uniform(4))
UNIFORM_DRY = Case("uniform, 2 x 61 x 48", (61, 61), 48, rule=fc.Uniform(4))


def job(
    bench: Bench, case: Case, dtype: torch.dtype, threads: int, chosen: Sequence[Implementation], suite: str = NAME
) -> Job:
    """Make the job of one setting."""
    chosen = [one for one in chosen if case.implementations is None or one.name in case.implementations]
    if any(one.group in ("compile", "max-autotune") for one in chosen):
        compiled.prepare(threads)
    x, batch = batch_of(case, dtype, bench.device)
    with x.device:
        expected = Expected(x, batch)
        if any(one.name == MIN_VARIANCE for one in chosen):
            of_min_variance = Expected(x, replace(batch, rule=eager.MIN_VARIANCE))
    tokens = len(expected.segments.starts)
    # A call of microseconds is timed on hot input: its cost is overhead, and thousands of buffers would hide that.
    once = case.calls == 1
    xs = bench.rotation(x) if once else [x]
    wide: list[Tensor] = []
    if any(one.padded for one in chosen):
        wide = bench.rotation(pad_sequence(list(x.split(list(case.lengths))), batch_first=True))
    # Upper bounds of the rows of a result: of ours in a graph, and of the windows of a padded batch.
    rows = max(case.frames + len(case.lengths), len(case.lengths) * max(case.lengths) // case.window)
    grads = gradients(rows * case.dim, dtype, min(len(xs), _GRADIENTS), bench.device) if once else []

    def check(name: str, x: Tensor, result: Tokens, grad: Tensor | None, grad_x: Tensor | None) -> dict[str, Any]:
        if x.dim() == 3:
            if grad is None:
                check_average_pool(name, x, batch, result)
            return {}
        if name.endswith("in a graph") and result.starts is not None:  # after the segments there is unused room
            inside = result.starts < len(x)
            result = Tokens(result.values[inside], result.starts[inside])
        if result.starts is None:  # only windows of one size, whose starts do not depend on the frames
            result = Tokens(result.values, eager.window_offsets(batch)[:-1])
        if name == MIN_VARIANCE:
            return {"differing_boundaries": of_min_variance.check(name, result, grad, grad_x)}
        return {"differing_boundaries": expected.check(name, result, grad, grad_x)}

    def bounds(bound: BandwidthBound, backward: bool) -> dict[str, Callable[[int], Any]]:
        rows = [grad[: x.numel()].view(x.shape) for grad in grads]
        return {kind: bound.calls(kind, xs, rows, tokens, threads, backward) for kind in KINDS} if once else {}

    moved = (case.frames + tokens) * case.dim * x.itemsize
    shape = {"sequences": len(case.lengths), "frames": case.frames, "dim": case.dim, "window": case.window}
    return Job(
        suite, case.name, dtype, threads, chosen, check, xs, batch, wide, grads, bounds=bounds, calls=case.calls,
        moved={FORWARD: moved, BOTH: 2 * moved}, details=shape | {"tokens": tokens, "input_buffers": len(xs)},
        # What the slowest forms allocate: a few fp32 copies of the input.
        recall=min(4 * case.frames * case.dim * 4, _MAX_RECALL) if once else 0,
    )  # fmt: skip


def run(bench: Bench) -> None:
    """Measure every case."""
    cases = (DRY,) if bench.dry else GPU_CASES if bench.on_gpu else CASES
    if bench.quick and not bench.on_gpu:
        cases = (QUICK, CASES[-1])
    for case in cases:
        if case.name in (bench.cases or (case.name,)):
            for dtype, threads in bench.settings():
                compare(bench, job(bench, case, dtype, threads, implementations(bench)))
    uniform = UNIFORM_DRY if bench.dry else UNIFORM
    if bench.on_gpu and uniform.name in (bench.cases or (uniform.name,)):
        for dtype, threads in bench.settings():
            compare(bench, job(bench, uniform, dtype, threads, uniform_implementations(bench)))
