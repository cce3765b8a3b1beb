"""Suite ``roofline``: the limits of the machine, measured, and the work of pooling, counted.

The work is that of the job, whatever does it: a form that reads x three times, or computes each norm twice, does not
move or compute more by this count, it is slower. So all forms of a table have the same operations per byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.clock import Clock, CpuClock, interleave
from benchmarks.harness.compare import Bench
from benchmarks.harness.device import DeviceClock
from benchmarks.results import BOTH

NAME = "roofline"
READ, COPY, SEPARATE, FUSED = "read", "copy", "multiply and add", "fused multiply-add"
#: Bytes that are read or copied in turn, more than every last-level cache on the market but the stacked ones, and bytes
#: per sample: a millisecond, for which even a busy machine has a free core now and then.
SIZE, PART = 256 << 20, 16 << 20
#: Steps of arithmetic, which take about as long.
STEPS = 100_000
ROUNDS = 200


def operations(frames: int, width: int, tokens: int, direction: str, scores: bool = True) -> int:
    """Count the operations of pooling ``frames`` x ``width`` to ``tokens``, as ``csrc/cpu/segment_pool.cpp`` does.

    2 multiplications and 2 additions per element to score, 1 addition to average, one division per element of the
    result, and another one backward. Widening, comparisons and scalars per frame are left out.

    Args:
        scores: Whether frames are compared, which fixed windows do not need.
    """
    forward = (5 if scores else 1) * frames * width + tokens * width
    return forward + tokens * width if direction == BOTH else forward


def run(bench: Bench) -> None:
    """Measure the rates at the 10th percentile of the times; on a GPU that of copies by PyTorch only."""
    bound, steps = bench.bound, 1000 if bench.quick else STEPS
    if bound is None and not bench.on_gpu:
        return print("roofline: not measured without the probe of the bandwidth bound")
    sources, targets = (torch.ones(SIZE, dtype=torch.uint8, device=bench.device) for _ in range(2))
    for threads in bench.threads:
        functions: dict[str, Callable[[int], Any]] = {COPY: lambda _: targets.copy_(sources)}
        clock: Clock = DeviceClock(bench.device)
        work = {COPY: 2 * SIZE}
        if bound is not None:
            torch.set_num_threads(threads)
            ins, outs = sources.split(PART), targets.split(PART)
            functions = {
                READ: lambda i: bound.read(ins[i % len(ins)], threads),  # noqa: B023  (called in this round)
                COPY: lambda i: bound.copy(ins[i % len(ins)], outs[i % len(outs)], threads),  # noqa: B023
                SEPARATE: lambda i: bound.arithmetic(steps, False, threads),  # noqa: B023
                FUSED: lambda i: bound.arithmetic(steps, True, threads),  # noqa: B023
            }
            work = {name: bound.arithmetic(steps, name == FUSED, threads) for name in (SEPARATE, FUSED)}
            work |= {READ: PART, COPY: 2 * PART}
            clock = CpuClock(tries=1)
        reps = bench.reps if bench.quick or bench.on_gpu else ROUNDS
        samples, disturbance = interleave(functions, reps, clock)
        for name in functions:
            rate, group = work[name] / samples[name].fields()["p10"], "bytes" if name in (READ, COPY) else "operations"
            group = f"{group} per second"
            bench.recorder.add(NAME, "limits", name, group, threads=threads, rate=rate, **vars(disturbance))
            print(f"{NAME}, {threads or 'GPU'} thr, {name}: {rate / 1e9:.1f} G {group}", flush=True)
