"""Suite ``segment_pool``: local maxima against the same job in PyTorch, compiled and eager, and in other libraries."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.bandwidth_bound import KINDS, BandwidthBound
from benchmarks.harness.cases import Case, Inputs, gradients, inputs_of, padded, random_lengths
from benchmarks.harness.compare import TRITON, Bench, Contender, Job, compare
from benchmarks.measurement import BOTH, OURS
from benchmarks.suites import compiled, eager
from benchmarks.suites.checks import Expected, check_average_pool, exact_starts
from benchmarks.suites.eager import Tokens

NAME = "segment_pool"
AVERAGE_POOL = "AvgPool1d, padded, less work"
#: Most bytes of new memory that are made ready before a sample.
_MAX_RECALL = 2 << 30
#: Gradients to rotate through.
_GRADIENTS = 8


def _eager(scores: str, pool: str, group: str = "eager", module: str | None = None) -> Contender:
    form = eager.vectorised(getattr(eager, f"{scores}_scores"), getattr(eager, pool))
    return Contender(f"{scores} + {pool}", group, lambda: form, module=module)


CONTENDERS: tuple[Contender, ...] = (
    Contender(OURS, OURS, lambda: eager.fastcompress_pool),
    Contender("compile, plain", "compile", compiled.plain),
    Contender("compile, tuned + gather", "compile", lambda: compiled.tuned("gather")),
    Contender("compile, tuned + embedding_bag", "compile", lambda: compiled.tuned("embedding_bag")),
    _eager("cosine", "embedding_bag"),
    _eager("cosine", "scatter_reduce"),
    _eager("cosine", "index_add"),
    _eager("cosine", "segment_reduce"),
    _eager("bmm", "embedding_bag"),
    _eager("bmm", "scatter_reduce"),
    _eager("bmm", "index_add"),
    _eager("bmm", "segment_reduce"),
    _eager("blocked", "embedding_bag"),
    _eager("cosine", "segment_csr", "library", "torch_scatter"),
    _eager("bmm", "segment_csr", "library", "torch_scatter"),
    _eager("bmm", "jagged", "library", "fbgemm_gpu"),
    Contender("loop, tensor_split", "loop", lambda: eager.loop("tensor_split")),
    Contender("loop, split", "loop", lambda: eager.loop("split")),
    Contender(AVERAGE_POOL, "less work", lambda: eager.average_pool, padded=True),
)

_FEW = (OURS, "compile, plain", "cosine + index_add", "bmm + embedding_bag", "loop, split")
CASES: tuple[Case, ...] = (
    Case("S1", random_lengths(8, 1350, 1500, seed=5), 1280),
    Case("S2", random_lengths(32, 200, 1500, seed=5), 1280),
    Case("clip", (1500,), 1280),
    Case("tiny", (8,), 64, calls=500, contenders=_FEW),
    Case("long", (60_000,), 3584, default=False),
    Case(
        "quick",
        random_lengths(4, 300, 400, seed=5),
        1280,
        default=False,
        contenders=(*_FEW, "bmm + segment_csr", "bmm + jagged", "blocked + embedding_bag", AVERAGE_POOL),
    ),
)


def _gpu_case(count: int, frames: int, dim: int, dtypes: tuple[str, ...] = ("bf16",)) -> Case:
    return Case(f"{count} x {frames} x {dim}", (frames,) * count, dim, dtypes=dtypes)


#: Every stage takes the same inputs, which take seconds to make.
_gpu_inputs = functools.lru_cache(maxsize=32)(inputs_of)
_BOTH_DTYPES = ("bf16", "fp32")
GPU_CASES = (
    _gpu_case(1, 750, 1280, _BOTH_DTYPES),
    _gpu_case(8, 750, 1280),
    _gpu_case(32, 750, 1280),
    _gpu_case(32, 1500, 1280, _BOTH_DTYPES),
    _gpu_case(1, 90_000, 1280),  # one hour at 25 Hz
    _gpu_case(32, 1500, 3584, _BOTH_DTYPES),
)
DRY_CASES = (_gpu_case(2, 60, 48, _BOTH_DTYPES),)


def gpu_contenders(dry: bool) -> list[Contender]:
    """Contenders on a GPU, in the order in which they are measured as long as there is time."""
    bound = functools.partial(eager.fastcompress_pool, compact=False)
    found = [Contender(OURS, OURS, lambda: eager.fastcompress_pool, bound, backend=None if dry else "cuda")]
    if not dry or os.environ.get("TRITON_INTERPRET") == "1":
        found.append(
            Contender(
                f"{OURS}, triton", TRITON, lambda: eager.fastcompress_pool, bound, backend="triton", module="triton"
            )
        )
    found += [_eager("cosine", "index_add"), _eager("bmm", "index_add"), _eager("bmm", "embedding_bag")]
    found += [_eager("bmm", "scatter_reduce"), _eager("bmm", "segment_reduce")]
    found.append(_eager("bmm", "segment_csr", "library", "torch_scatter"))
    # Compiling for the CPU would take most of a dry run.
    for group, how in (("compile", {}), ("max-autotune", {"mode": "max-autotune"})):
        options: dict[str, Any] = {"backend": "aot_eager"} if dry else how
        found.append(Contender(f"{group}, plain", group, functools.partial(compiled.plain, **options)))
        found.append(Contender(f"{group}, tuned", group, functools.partial(compiled.tuned, "gather", **options)))
    return found


@dataclass
class PoolJob(Job):
    """Segment pooling of one case. ``expected`` is what contenders are compared with."""

    expected: Expected | None = None

    def check(
        self, name: str, batch: Any, result: Tokens, grad: Tensor | None, grad_x: Tensor | None
    ) -> dict[str, Any]:
        if batch.x.dim() == 3:
            if grad is None:
                check_average_pool(name, batch, result)
            return {}
        first = self.expected is None
        expected = self.expected or Expected(batch, exact_starts(batch))
        if name.endswith("in a graph") and result.starts is not None:  # after the segments there is unused room
            count = len(expected.starts)
            result = Tokens(result.values[:count], result.starts[:count])
        differing = expected.check(name, result, grad, grad_x)
        if first and result.starts is not None:  # the other contenders are compared with the library's segments
            self.expected = Expected(batch, result.starts)
            self.details["tokens"] = len(result.starts)
        return {"differing_boundaries": differing}

    def moved(self, direction: str) -> int | None:
        x = self.batches[0].x
        once: int = (x.shape[0] + self.details["tokens"]) * x.shape[1] * x.itemsize
        return 2 * once if direction == BOTH else once

    def bounds(self, bound: BandwidthBound, backward: bool) -> Mapping[str, Callable[[int], Any]]:
        if self.calls > 1:
            return {}
        xs, tokens = [inputs.x for inputs in self.batches], self.details["tokens"]
        grads = [grad[: xs[0].numel()].view(-1, xs[0].shape[1]) for grad in self.grads]
        return {kind: bound.calls(kind, xs, grads, tokens, self.threads, backward) for kind in KINDS}


def job(
    bench: Bench, case: Case, dtype: torch.dtype, threads: int, contenders: Sequence[Contender], suite: str
) -> PoolJob:
    """The job of one setting."""
    contenders = [one for one in contenders if case.contenders is None or one.name in case.contenders]
    if any(one.group in ("compile", "max-autotune") for one in contenders):
        compiled.prepare(threads)
    first = (_gpu_inputs if bench.on_gpu else inputs_of)(case, dtype, bench.device)
    # A call of microseconds is timed on hot input: its cost is overhead, and thousands of buffers would hide that.
    rotate = case.calls == 1 and not bench.on_gpu
    batches = first.rotation(bench.cache) if rotate else [first]
    windows: list[Inputs] = []
    if any(one.padded for one in contenders):
        wide = padded(first, case.lengths)
        windows = wide.rotation(bench.cache) if rotate else [wide]
    most = max(case.frames, *(one.x.shape[0] * one.x.shape[1] // case.window for one in windows[:1]), 0) * case.dim
    grads = gradients(most, dtype, min(len(batches), _GRADIENTS), bench.device) if case.calls == 1 else []
    # What the slowest forms allocate: a few fp32 copies of the input.
    recall = min(4 * case.frames * case.dim * 4, _MAX_RECALL) if case.calls == 1 else 0
    shape = {"sequences": len(case.lengths), "frames": case.frames, "dim": case.dim, "window": case.window}
    details = shape | {"input_buffers": len(batches)}
    return PoolJob(
        suite, case.name, dtype, threads, contenders, batches, windows, grads,
        calls=case.calls, recall=recall, details=details,
    )  # fmt: skip


def run(bench: Bench) -> None:
    """Measure every case; on a GPU the eager contenders on all cases first, then what takes long to compile."""
    if bench.on_gpu:
        contenders = gpu_contenders(bench.dry)
        cases = [case for case in (DRY_CASES if bench.dry else GPU_CASES) if case.name in (bench.cases or (case.name,))]
        for stage in (("eager", "library"), ("compile",), ("max-autotune",)):
            chosen = [one for one in contenders if one.group in (OURS, *stage) or (one.ours and "eager" in stage)]
            for case in cases:
                for dtype, threads in bench.settings(case.dtypes):
                    one = job(bench, case, dtype, threads, chosen, NAME)
                    one.details["stage"] = stage[0]
                    compare(bench, one)
        return
    names = bench.cases or (["quick", "tiny"] if bench.quick else [case.name for case in CASES if case.default])
    for case in (case for case in CASES if case.name in names):
        for dtype, threads in bench.settings(case.dtypes):
            compare(bench, job(bench, case, dtype, threads, CONTENDERS, NAME))
