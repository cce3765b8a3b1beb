"""Suite ``scaling``: how the time of pooling grows with frames, their width, segment length, window and threads.

Each axis is a few cases that differ in one thing from ``BASE``: 10 clips of 1,000 frames of width 1280 at local maxima.
The clips have one length, so that no contender pays for padding. A case on two axes is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import fastcompress as fc
from benchmarks.harness.cases import Case
from benchmarks.harness.compare import TORCH_DTYPES, Bench, compare
from benchmarks.measurement import OURS
from benchmarks.suites.segment_pool import AVERAGE_POOL, CONTENDERS, gpu_contenders, job

NAME = "scaling"
#: The fastest of each group in the committed results of ``segment_pool``.
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
    """Segments of ``length`` frames on average, by a threshold; windows of the same length."""
    name = f"segments of {length}"
    return Case(name, like.lengths, like.dim, contenders=FORMS, mean_length=length, window=length)


def _by_window(size: int, like: Case) -> Case:
    """Windows of ``size``; ``AvgPool1d`` leaves out the last window of a clip if it is not full."""
    name = f"windows of {size}"
    return Case(name, like.lengths, like.dim, contenders=(OURS, AVERAGE_POOL), rule=fc.Uniform(size), window=size)


BASE = _case("base")


@dataclass(frozen=True)
class Axis:
    """Cases that differ in one thing.

    Attributes:
        name: Name of the thing.
        cases: Cases in increasing order of it; the axis of threads has one case, on several numbers of threads.
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
    """Return what to measure, a case with a number of threads, and the axes that each is on.

    The axis of threads takes all of ``threads``, the others the last. Cases with more than ``most`` bytes of input in
    fp32 are left out.
    """
    found: dict[tuple[Case, int], tuple[str, ...]] = {}
    for axis in axes:
        for case in axis.cases:
            if most is not None and case.input_bytes(torch.float32) > most:
                continue
            for count in threads if axis.name == THREADS else threads[-1:]:
                found[case, count] = (*found.get((case, count), ()), axis.name)
    return found


def value(axis: str, frames: int, width: int, tokens: int, window: int, threads: int) -> float:
    """The place of a table on an axis."""
    places = {FRAMES: frames, WIDTH: width, LENGTH: frames / tokens, WINDOW: window, THREADS: threads}
    return places[axis]


def run(bench: Bench) -> None:
    """Measure the axes; without the compiled forms, which take seconds per case to compile, in a quick run."""
    quick = bench.quick or bench.dry
    contenders = gpu_contenders(bench.dry) if bench.on_gpu else [one for one in CONTENDERS if one.name in FORMS]
    contenders = [one for one in contenders if not (quick and one.group == "compile") and one.group != "max-autotune"]
    bench = replace(bench, tries=min(bench.tries, 2))
    names = {one.name for one in contenders}
    axes = [axis for axis in (QUICK if quick else AXES) if bench.cases is None or axis.name in bench.cases]
    for (case, threads), on in plan(axes, bench.threads, bench.most).items():
        for dtype in bench.dtypes:
            some = [one for one in contenders if one.name in (case.contenders or names) or bench.on_gpu]
            if bench.on_gpu and isinstance(case.rule, fc.Uniform):
                some = [one for one in some if one.ours]
            one = job(bench, replace(case, contenders=None), TORCH_DTYPES[dtype], threads, some, NAME)
            one.details["axes"] = on
            one.reps, one.max_seconds = 9, 2.0
            compare(bench, one)
