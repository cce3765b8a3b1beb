"""Suite ``memory``: what a call of ``segment_pool`` needs beyond its outputs.

``python -m benchmarks.suites.memory FRAMES DIM DTYPE THREADS`` prints it as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import fastcompress as fc
from benchmarks.harness.cases import cu_seqlens, features
from benchmarks.harness.compare import Bench
from benchmarks.harness.memory import high_water, in_process
from benchmarks.measurement import OURS

NAME = "memory"
#: Frames and width: so long that a page or a thread's scratch vanishes in the quotient.
FRAMES, DIM = 60_000, 1280


def measure(frames: int, dim: int, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Measure one call in this process, which should be fresh."""
    torch.set_num_threads(threads)
    rule = fc.LocalMax()
    x, cu = features(frames, dim, dtype), cu_seqlens([1500] * (frames // 1500) + [frames % 1500] * (frames % 1500 > 0))
    with torch.no_grad():
        fc.segment_pool(x[:3000].clone(), cu_seqlens=cu_seqlens([1500, 1500]), rule=rule)  # code, threads, allocator
        results = []
        peak = high_water(lambda: results.append(fc.segment_pool(x, cu_seqlens=cu, rule=rule)))
    pooled, segments = results[0], results[0].segments
    outputs = (pooled.values, segments.starts, segments.lengths, segments.cu_segments)
    return {
        "frames": frames,
        "dim": dim,
        "tokens": pooled.values.shape[0],
        "input_bytes": x.nbytes,
        "output_bytes": sum(tensor.nbytes for tensor in outputs),
        "reserved_bytes": pooled.values.untyped_storage().nbytes(),
        "peak_bytes": peak,
    }


def run(bench: Bench) -> None:
    """Measure each dtype on the most threads."""
    frames = 15_000 if bench.quick else FRAMES
    for dtype, threads in bench.settings():
        if threads != bench.threads[-1]:
            continue
        name = str(dtype).removeprefix("torch.")
        found = in_process(NAME, frames, DIM, name, threads)
        case, missing = f"{frames} x {DIM}", "the system does not report it"
        fields = found or {"not_timed": missing}
        bench.recorder.add(NAME, case, OURS, OURS, dtype=name, threads=threads, **fields)
        extra = f"{found['peak_bytes'] - found['output_bytes']:,} bytes beyond the outputs" if found else missing
        print(f"{NAME}, {case}, {name}, {threads} thr: {extra}", flush=True)


if __name__ == "__main__":
    _frames, _dim, _dtype, _threads = sys.argv[1:]
    print(json.dumps(measure(int(_frames), int(_dim), getattr(torch, _dtype), int(_threads))))
