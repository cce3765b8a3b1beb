"""How far from the machine's limits: its bandwidth and its arithmetic, measured, and the work of a job, counted.

The work is that of the job, whoever does it: a form that reads x three times, or computes each norm twice, does not
move or compute more by this count, it is slower. So all forms of a table have the same operations a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.floor import Floor
from benchmarks.measure import BOTH
from benchmarks.timing import Disturbance, interleave

#: Bytes that are read or copied: above every last-level cache on the market but the stacked ones.
SIZE = 256 << 20
#: Steps of arithmetic: some 10 ms.
STEPS = 1_000_000


def operations(frames: int, width: int, tokens: int, direction: str, scores: bool = True) -> int:
    """Of pooling ``frames`` x ``width`` to ``tokens``, by the model at the head of ``csrc/cpu/segment_pool.cpp``.

    2 multiplications and 2 additions an element to score, 1 addition to average, a division an element of the result;
    backward another one. Widening, comparisons and the scalars of a frame are left out.

    Args:
        scores: whether frames are compared, which fixed windows do not need.
    """
    forward = (5 if scores else 1) * frames * width + tokens * width
    return forward + tokens * width if direction == BOTH else forward


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, on a number of threads: rates of the 10th percentile of the times.

    Attributes:
        read: bytes a second.
        copy: bytes read and written a second, to memory written before.
        separate: fp32 operations a second, additions and multiplications in instructions of their own, as many of each:
            what the definition of the distance allows.
        fused: the same in fused ones.
    """

    threads: int
    read: float
    copy: float
    separate: float
    fused: float
    disturbance: Disturbance


def measure(floor: Floor, threads: int, reps: int, tries: int, size: int = SIZE, steps: int = STEPS) -> Ceilings:
    """All four, interleaved."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    functions: dict[str, Callable[[int], Any]] = {
        "read": lambda i: floor.read(source, threads),
        "copy": lambda i: floor.copy(source, target, threads),
        "separate": lambda i: floor.arithmetic(steps, False, threads),
        "fused": lambda i: floor.arithmetic(steps, True, threads),
    }
    samples, disturbance = interleave(functions, reps, tries=tries)
    work = {
        "read": size,
        "copy": 2 * size,
        "separate": floor.arithmetic(steps, False, threads),
        "fused": floor.arithmetic(steps, True, threads),
    }
    rates = {name: amount / samples[name].p10 for name, amount in work.items()}
    return Ceilings(threads, **rates, disturbance=disturbance)


def rows(found: Sequence[Ceilings]) -> list[Sequence[str]]:
    """For ``report.align``."""
    lines: list[Sequence[str]] = [["ceilings", "read GB/s", "copy GB/s", "Gop/s", "fused Gop/s"]]
    for one in found:
        rates = [f"{rate / 1e9:.1f}" for rate in (one.read, one.copy, one.separate, one.fused)]
        lines.append([f"{one.threads} thr", *rates])
    return lines
