"""Suite ``memory``: what a call of ``segment_pool`` needs beyond its outputs."""

from __future__ import annotations

from typing import Any

import torch

import fastcompress as fc
from benchmarks.harness.cases import cu_seqlens, features
from benchmarks.harness.compare import Bench
from benchmarks.harness.memory import high_water, in_process
from benchmarks.results import OURS

NAME = "memory"
#: Frames and width: so long that a page or a thread's scratch vanishes in the quotient.
FRAMES, DIM, CLIP = 60_000, 1280, 1500


def measure(frames: int, dim: int, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Measure one call in this process, which should be fresh."""
    torch.set_num_threads(threads)
    x, rule = features(frames, dim, dtype), fc.LocalMax()
    with torch.no_grad():
        fc.segment_pool(x[: 2 * CLIP].clone(), cu_seqlens=cu_seqlens([CLIP] * 2), rule=rule)  # code, allocator, threads
        cu, results = cu_seqlens([CLIP] * (frames // CLIP)), []
        peak = high_water(lambda: results.append(fc.segment_pool(x, cu_seqlens=cu, rule=rule)))
    pooled, segments = results[0], results[0].segments
    outputs = (pooled.values, segments.starts, segments.lengths, segments.cu_segments)
    size = sum(tensor.nbytes for tensor in outputs)
    return {"frames": frames, "dim": dim, "tokens": len(pooled.values), "output_bytes": size, "peak_bytes": peak}


def run(bench: Bench) -> None:
    """Measure each dtype on the most threads."""
    frames, missing = 15_000 if bench.quick else FRAMES, "the system does not report it"
    for dtype, threads in bench.settings():
        if threads == bench.threads[-1]:
            name, case = str(dtype).removeprefix("torch."), f"{frames} x {DIM}"
            found = in_process(measure, frames, DIM, dtype, threads)
            fields: dict[str, Any] = dict(found or {"not_timed": missing})
            bench.recorder.add(NAME, case, OURS, OURS, dtype=name, threads=threads, **fields)
            extra = f"{found['peak_bytes'] - found['output_bytes']:,} bytes beyond the outputs" if found else missing
            print(f"{NAME}, {case}, {name}, {threads} thr: {extra}", flush=True)
