"""How far from the machine's limits: its bandwidth and its arithmetic, measured, and the work of a job, counted.

The work is that of the job, whoever does it: a form that reads x three times, or computes each norm twice, does not
move or compute more by this count, it is slower. So all forms of a table have the same operations a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.bandwidth_bound import Floor
from benchmarks.harness.clock import Disturbance, interleave
from benchmarks.harness.compare import BOTH

#: Bytes that are read or copied in turn, above every last-level cache on the market but the stacked ones, and bytes of
#: a sample: a millisecond, for which even a busy machine leaves a core to us now and then.
SIZE, PART = 256 << 20, 16 << 20
#: Steps of arithmetic, about as long.
STEPS = 100_000
#: Rounds, of the rate of whose best tenth we speak.
ROUNDS = 200


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


def measure(floor: Floor, threads: int, rounds: int = ROUNDS, steps: int = STEPS) -> Ceilings:
    """All four, interleaved."""
    sources, targets = (torch.ones(SIZE, dtype=torch.uint8).split(PART) for _ in range(2))
    functions: dict[str, Callable[[int], Any]] = {
        "read": lambda i: floor.read(sources[i % len(sources)], threads),
        "copy": lambda i: floor.copy(sources[i % len(sources)], targets[i % len(targets)], threads),
        "separate": lambda i: floor.arithmetic(steps, False, threads),
        "fused": lambda i: floor.arithmetic(steps, True, threads),
    }
    samples, disturbance = interleave(functions, rounds, tries=1)
    work = {
        "read": PART,
        "copy": 2 * PART,
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
