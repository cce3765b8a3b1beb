"""Suite ``scaling``: how the time of pooling grows with frames, their width, segment length, window and threads.

Each axis is a few cases that differ in one thing from ``BASE``: 10 clips of 1,000 frames of width 1280 at local maxima.
The clips have one length, so that no implementation pays for padding. A case on two axes is measured once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import fastcompress as fc
from benchmarks.harness.cases import Case
from benchmarks.harness.compare import TORCH_DTYPES, Bench, compare
from benchmarks.results import OURS
from benchmarks.suites.segment_pool import AVERAGE_POOL, implementations, job

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
FRAMES, WIDTH, LENGTH, WINDOW, THREADS = "frames", "width", "segment length", "window", "threads"


def _axes(base: Case, clips: Sequence[int], widths: Sequence[int], sizes: Sequence[int]) -> dict[str, list[Case]]:
    """Return the cases of each axis, in increasing order; that of threads is one case on several threads."""
    clip, windowed = base.lengths[0], (OURS, AVERAGE_POOL)
    axes = {
        FRAMES: [replace(base, name=f"{n} clip" + "s" * (n > 1), lengths=(clip,) * n) for n in clips],
        WIDTH: [replace(base, name=f"width {width}", dim=width) for width in widths],
        LENGTH: [replace(base, name=f"segments of {n}", mean_length=n, window=n) for n in (1, *sizes)],
        WINDOW: [
            replace(base, name=f"windows of {n}", rule=fc.Uniform(n), window=n, implementations=windowed)
            for n in (2, *sizes)
        ],
    }
    for axis in (FRAMES, WIDTH):
        axes[axis] = sorted([*axes[axis], base], key=lambda case: (case.frames, case.dim))
    return axes | {THREADS: [base]}


BASE = Case("base", (1000,) * 10, 1280, implementations=FORMS)
AXES = _axes(BASE, (1, 3, 30, 100), (64, 256, 4096), (4, 16, 64))
QUICK = _axes(Case("quick", (100, 100), 64, implementations=FORMS), (4,), (), (4,))


def plan(axes: Mapping[str, Sequence[Case]], threads: Sequence[int]) -> dict[tuple[Case, int], tuple[str, ...]]:
    """Return what to measure, a case with a number of threads, and the axes that each is on.

    The axis of threads takes all of ``threads``, the others the last.
    """
    found: dict[tuple[Case, int], tuple[str, ...]] = {}
    for axis, cases in axes.items():
        for case in cases:
            for count in threads if axis == THREADS else threads[-1:]:
                found[case, count] = (*found.get((case, count), ()), axis)
    return found


def value(axis: str, frames: int, width: int, tokens: int, window: int, threads: int) -> float:
    """Return the place of a table on an axis."""
    length = float(f"{frames / tokens:.2g}")  # the same for dtypes that round a few boundaries differently
    places = {FRAMES: frames, WIDTH: width, LENGTH: length, WINDOW: window, THREADS: threads}
    return places[axis]


def run(bench: Bench) -> None:
    """Measure the axes; without the compiled forms, which take seconds per case to compile, in a quick run."""
    quick = bench.quick or bench.dry
    bench = replace(bench, tries=min(bench.tries, 2))
    chosen = [one for one in implementations(bench) if not (quick and one.group in ("compile", "max-autotune"))]
    axes = {name: cases for name, cases in (QUICK if quick else AXES).items() if name in (bench.cases or (name,))}
    for (case, threads), on in plan(axes, bench.threads).items():
        if bench.on_gpu:  # and Triton
            case = replace(case, implementations=(*(case.implementations or ()), f"{OURS}, triton"))
        for dtype in bench.dtypes:
            one = job(bench, case, TORCH_DTYPES[dtype], threads, chosen, NAME)
            one.details["axes"] = on
            one.reps, one.max_seconds = 9, 2.0
            compare(bench, one)
