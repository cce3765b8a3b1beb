"""What the library set out to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from benchmarks.measurement import BOTH, BOUND, CLONE, DTYPES, FORWARD, OURS
from benchmarks.tables import best, markdown

#: Without a compiler: what runs PyTorch or another library operation by operation.
EAGER = ("eager", "library", "loop")


@dataclass(frozen=True)
class Aim:
    """A figure to reach, in each table of some cases.

    Attributes:
        name, goal: Name, and least ratio of the other's time to ours; with ``at_most``, greatest of ours to the
            other's. A ratio must exceed its goal if ``strict``.
        groups, contender: The other: the best of these groups, or this one; with neither, our microseconds count.
    """

    name: str
    dtype: str
    direction: str
    goal: float
    groups: tuple[str, ...] = ()
    contender: str | None = None
    at_most: bool = False
    strict: bool = False
    cases: tuple[str, ...] = ("S1", "S2", "clip", "long")

    def figure(self, table: pd.DataFrame) -> float | None:
        """The figure in one table; ``None`` if something was not measured."""
        ours = best(table, OURS)
        if self.groups or self.contender:
            some = table if self.groups else table[table["contender"] == self.contender]
            other = best(some, *(self.groups or set(table["group"])))
            if ours is None or other is None:
                return None
            ratio = float(other["median"] / ours["median"])
            return 1 / ratio if self.at_most else ratio
        return None if ours is None else float(ours["median"]) * 1e6

    def reached(self, figure: float) -> bool:
        """Whether a figure meets the goal."""
        if self.at_most:
            return figure <= self.goal
        return figure > self.goal if self.strict else figure >= self.goal


def _bounds(dtype: str, goal: float) -> list[Aim]:
    name = f"{DTYPES[dtype]} forward / {BOUND}"
    kinds = ("fresh", "huge", "warm")
    return [Aim(f"{name}, {kind}", dtype, FORWARD, goal, (), f"{BOUND}, {kind}", at_most=True) for kind in kinds]


AIMS: dict[str, tuple[Aim, ...]] = {
    "segment_pool": (
        Aim("fp32 forward against compile", "float32", FORWARD, 3.2, ("compile",)),
        Aim("fp32 forward against eager", "float32", FORWARD, 7.5, EAGER),
        Aim("fp32 forward against AvgPool1d", "float32", FORWARD, 1.0, ("less work",), strict=True),
        *_bounds("float32", 1.25),
        Aim("bf16 forward against compile", "bfloat16", FORWARD, 4.0, ("compile",)),
        Aim("bf16 forward against eager", "bfloat16", FORWARD, 6.5, EAGER),
        *_bounds("bfloat16", 2.0),
        Aim("fp32 fwd + bwd against compile", "float32", BOTH, 2.7, ("compile",)),
        Aim("fp32 fwd + bwd against eager", "float32", BOTH, 6.0, EAGER),
        Aim("bf16 fwd + bwd against compile", "bfloat16", BOTH, 3.2, ("compile",)),
        Aim("bf16 fwd + bwd against eager", "bfloat16", BOTH, 6.0, EAGER),
        Aim("fp32 tiny call, µs", "float32", FORWARD, 20.0, at_most=True, cases=("tiny",)),
        Aim("bf16 tiny call, µs", "bfloat16", FORWARD, 20.0, at_most=True, cases=("tiny",)),
    ),
    "pack": tuple(
        Aim(f"{short} against {name}", dtype, FORWARD, goal, groups, contender, cases=("32 samples",))
        for dtype, short in DTYPES.items()
        if short != "fp16"
        for name, goal, groups, contender in (
            ("masked_scatter as in transformers", 5.0, ("transformers",), None),
            ("the best packed form by hand", 1.4, ("eager",), None),
            (f"a {CLONE}", 1.0, (), CLONE),
        )
    ),
}


def tables(rows: pd.DataFrame, suite: str) -> Iterator[str]:
    """A table of the aims of a suite: one line per aim, one column per case and number of threads."""
    rows = rows[rows["suite"] == suite]
    cases = {case for aim in AIMS[suite] for case in aim.cases}
    settings = {
        (str(key[0]), int(key[1])): table
        for key, table in rows[rows["case"].isin(cases)].groupby(["case", "threads"], sort=False)
    }
    lines = [["", "aim", *(f"{case}, {threads} thr" for case, threads in settings)]]
    for aim in AIMS[suite]:
        cells = []
        for (case, _), table in settings.items():
            one = table[(table["dtype"] == aim.dtype) & (table["direction"] == aim.direction)]
            figure = aim.figure(one) if case in aim.cases else None
            cells.append("" if figure is None else f"**{figure:.2f}**" if aim.reached(figure) else f"{figure:.2f}")
        if any(cells):
            lines.append([aim.name, f"{'<=' if aim.at_most else '>' if aim.strict else '>='} {aim.goal:g}", *cells])
    if len(lines) > 1:
        yield "Aims, and what was reached; those met are in bold."
        yield markdown(lines)
