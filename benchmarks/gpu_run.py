"""A run of the GPU benchmark: what it is measured with, how a call is timed, what was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness.device import Flush, capture, elapsed

FORWARD, BACKWARD = "forward", "backward"


@dataclass
class Measured:
    """Seconds, and what was moved. ``how``: ``graph`` or ``events``."""

    case: str
    dtype: str
    direction: str
    contender: str
    group: str
    how: str
    median: float
    p10: float
    p90: float
    moved: int
    call: float | None  # end to end, launching and waiting included
    peak: int | None = None  # bytes that a call allocates at most


@dataclass
class Run:
    """What is measured with, and what was found."""

    device: torch.device
    reps: int
    deadline: float
    flush: Flush
    copy_rate: float = 0.0
    rows: list[Measured] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(
        self,
        case: Any,
        dtype: torch.dtype,
        direction: str,
        contender: str,
        group: str,
        found: tuple[str, list[float]],
        moved: int,
        call: float | None = None,
        peak: int | None = None,
    ) -> None:
        """A row of what :func:`timed` found."""
        how, seconds = found
        low, high = seconds[len(seconds) // 10], seconds[min(len(seconds) - 1, 9 * len(seconds) // 10)]
        name, middle = str(dtype).removeprefix("torch."), statistics.median(seconds)
        self.rows.append(
            Measured(str(case), name, direction, contender, group, how, middle, low, high, moved, call, peak)
        )


def timed(run: Run, call: Callable[[], Any], graph: Callable[[], Any] | None) -> tuple[str, list[float]]:
    """How it was timed, and the seconds of each repetition in order."""
    how, ready = "events", call
    if graph is not None:
        try:
            ready, _ = capture(graph, run.device)
            how = "graph" if run.device.type == "cuda" else "no graph"
        except RuntimeError as error:
            run.skipped.append(f"a graph could not be captured: {error}")
    for _ in range(3):
        ready()
    return how, sorted(elapsed(ready, run.flush, run.device, run.reps))
