"""How the time of pooling grows: with frames, their width, the length of a segment, the window, and threads.

Each axis is a few cases that differ in one thing from ``BASE``: 10 clips of 1,000 frames of width 1280 at local maxima.
The clips are of one length, so that padding costs nobody anything. A case that lies on two axes is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastcompress as fc
from benchmarks.harness.cases import Case
from benchmarks.harness.compare import Table
from benchmarks.registry import CONTENDERS, OURS, Contender

AVERAGE_POOL = "AvgPool1d, padded, less work"
#: The fastest of each group in the committed results of the part ``pool``.
FORMS = (
    OURS,
    "compile, tuned + gather",
    "compile, tuned + embedding_bag",
    "blocked + embedding_bag",
    "bmm + embedding_bag",
    AVERAGE_POOL,
)
_CLIP = 1000


def _case(name: str, clips: int = 10, dim: int = 1280, clip: int = _CLIP) -> Case:
    return Case(name, (clip,) * clips, dim, contenders=FORMS)


def _by_length(length: int, like: Case) -> Case:
    """Segments of ``length`` frames on average, by a threshold; windows of as many."""
    name = f"segments of {length}"
    return Case(name, like.lengths, like.dim, contenders=FORMS, mean_length=length, window=length)


def _by_window(size: int, like: Case) -> Case:
    """Windows of ``size``, of which ``AvgPool1d`` leaves out the last of a clip where frames are missing."""
    name = f"windows of {size}"
    return Case(name, like.lengths, like.dim, contenders=(OURS, AVERAGE_POOL), rule=fc.Uniform(size), window=size)


BASE = _case("base")


@dataclass(frozen=True)
class Axis:
    """Cases that differ in one thing.

    Attributes:
        name: of the thing.
        cases: in increasing order of it; the axis of threads has one case, on several numbers of them.
    """

    name: str
    cases: tuple[Case, ...]


FRAMES, WIDTH, LENGTH, WINDOW, THREADS = "frames", "width", "segment length", "window", "threads"


AXES = (
    Axis(FRAMES, (_case("1 clip", 1), _case("3 clips", 3), BASE, _case("30 clips", 30), _case("100 clips", 100))),
    Axis(WIDTH, (_case("width 64", dim=64), _case("width 256", dim=256), BASE, _case("width 4096", dim=4096))),
    Axis(LENGTH, tuple(_by_length(length, BASE) for length in (1, 4, 16, 64))),
    Axis(WINDOW, tuple(_by_window(size, BASE) for size in (2, 4, 16, 64))),
    Axis(THREADS, (BASE,)),
)
_SMALL = _case("quick", 2, 64, 100)
QUICK = (
    Axis(FRAMES, (_SMALL, _case("quick, 4 clips", 4, 64, 100))),
    Axis(LENGTH, (_by_length(4, _SMALL),)),
    Axis(WINDOW, (_by_window(4, _SMALL),)),
    Axis(THREADS, (_SMALL,)),
)


def plan(
    axes: Sequence[Axis], threads: Sequence[int], most: float | None = None
) -> dict[tuple[Case, int], tuple[str, ...]]:
    """What to measure, a case and a number of threads each, and the axes that it lies on.

    The axis of threads takes all of ``threads``, the others the last. Cases with more than ``most`` bytes of input in
    fp32 are left out: a machine that is small or busy takes minutes for each.
    """
    found: dict[tuple[Case, int], tuple[str, ...]] = {}
    for axis in axes:
        for case in axis.cases:
            if most is not None and case.input_bytes(torch.float32) > most:
                continue
            for count in threads if axis.name == THREADS else threads[-1:]:
                found[case, count] = (*found.get((case, count), ()), axis.name)
    return found


def contenders(quick: bool) -> list[Contender]:
    """Who takes part; without the compiled forms, which take seconds to compile for each case, if ``quick``."""
    return [one for one in CONTENDERS if one.name in FORMS and not (quick and one.group == "compile")]


@dataclass(frozen=True)
class Point:
    """A table and the axes that it lies on."""

    axes: tuple[str, ...]
    table: Table


def value(axis: str, frames: int, width: int, tokens: int, window: int, threads: int) -> float:
    """Where on an axis a table lies, by what it says of itself."""
    places = {FRAMES: frames, WIDTH: width, LENGTH: frames / tokens, WINDOW: window, THREADS: threads}
    return places[axis]


def rows(points: Sequence[Point], axis: str) -> list[Sequence[str]]:
    """For ``report.align``: a line a table of an axis, the best of each group in multiples of ours."""
    groups = ("compile", "eager", "less work", "floor")
    lines: list[Sequence[str]] = [[axis, "", "ms", "GB/s", *(f"x {group}" for group in groups)]]
    for point in (point for point in points if axis in point.axes):
        table, case = point.table, point.table.case
        ours = table.row(OURS)
        assert ours is not None  # or nothing would have been measured
        where = value(axis, case.frames, case.dim, table.tokens, case.window, table.threads)
        bests = [table.best(group) if group != "floor" else table.row("floor, fresh") for group in groups]
        multiples = ["" if best is None else f"{best.median / ours.median:.2f}" for best in bests]
        rate, setting = f"{table.moved / ours.median / 1e9:.1f}", f"{table.dtype}, {table.direction}"
        lines.append([f"{where:.3g}", setting, f"{ours.median * 1e3:.3f}", rate, *multiples])
    return lines
