"""What the library has set out to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.compare import BOTH, FORWARD, Table
from benchmarks.registry import OURS

#: Without a compiler: everything that runs PyTorch or another library operation by operation.
EAGER = ("eager", "library", "loop")


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        name: row of the final table.
        dtype, direction: where it applies.
        goal: a least ratio of the other's time to ours, or, ``at_most``, a greatest of ours to the other's. A ratio
            must exceed its goal where ``strict``.
        groups: the other is the best of these groups of contenders ...
        row: ... or this row; for ``tiny``, neither: the time itself in microseconds.
        cases: where it applies.
    """

    name: str
    dtype: str
    direction: str
    goal: float
    groups: tuple[str, ...] = ()
    row: str | None = None
    at_most: bool = False
    strict: bool = False
    cases: tuple[str, ...] = ("S1", "S2", "clip", "long", "quick")


@dataclass(frozen=True)
class Outcome:
    """A target in one setting.

    Attributes:
        figure: what was measured.
        against: the contender it was measured against, empty for a time.
    """

    target: Target
    case: str
    threads: int
    figure: float
    against: str

    @property
    def reached(self) -> bool:
        """Whether the figure meets the goal."""
        if self.target.at_most:
            return self.figure <= self.target.goal
        return self.figure > self.target.goal if self.target.strict else self.figure >= self.target.goal


def _floors(dtype: str, goal: float) -> tuple[Target, ...]:
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    return tuple(
        Target(f"{short} forward / floor, {kind}", dtype, FORWARD, goal, row=f"floor, {kind}", at_most=True)
        for kind in ("fresh", "huge", "warm")
    )


TARGETS: tuple[Target, ...] = (
    Target("fp32 forward vs compile", "float32", FORWARD, 3.2, ("compile",)),
    Target("fp32 forward vs eager", "float32", FORWARD, 7.5, EAGER),
    Target("fp32 forward vs AvgPool1d", "float32", FORWARD, 1.0, ("less work",), strict=True),
    *_floors("float32", 1.25),
    Target("bf16 forward vs compile", "bfloat16", FORWARD, 4.0, ("compile",)),
    Target("bf16 forward vs eager", "bfloat16", FORWARD, 6.5, EAGER),
    *_floors("bfloat16", 2.0),
    Target("fp32 fwd+bwd vs compile", "float32", BOTH, 2.7, ("compile",)),
    Target("fp32 fwd+bwd vs eager", "float32", BOTH, 6.0, EAGER),
    Target("bf16 fwd+bwd vs compile", "bfloat16", BOTH, 3.2, ("compile",)),
    Target("bf16 fwd+bwd vs eager", "bfloat16", BOTH, 6.0, EAGER),
    Target("fp32 tiny call, µs", "float32", FORWARD, 20.0, at_most=True, cases=("tiny",)),
    Target("bf16 tiny call, µs", "bfloat16", FORWARD, 20.0, at_most=True, cases=("tiny",)),
)


def outcome(target: Target, table: Table) -> Outcome | None:
    """The target in a table, ``None`` where it does not apply or nothing was measured."""
    ours = table.row(OURS)
    place = (table.case.name in target.cases, table.dtype == target.dtype, table.direction == target.direction)
    if ours is None or not all(place):
        return None
    if not target.groups and target.row is None:
        return Outcome(target, table.case.name, table.threads, ours.median * 1e6, "")
    other = table.best(*target.groups) if target.groups else table.row(target.row or "")
    if other is None:
        return None
    figure = ours.median / other.median if target.at_most else other.median / ours.median
    return Outcome(target, table.case.name, table.threads, figure, other.contender)


def outcomes(tables: Sequence[Table]) -> list[Outcome]:
    """Every target in every table where it applies."""
    found = (outcome(target, table) for target in TARGETS for table in tables)
    return [one for one in found if one is not None]
