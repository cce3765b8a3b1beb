"""What the report and its plots share: figures derived from measurements, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from benchmarks.measurement import BOTH, BOUND, CLONE, DTYPES, FORWARD, OURS, TABLE
from benchmarks.suites import roofline, scaling

FRESH = f"{BOUND}, fresh"
DIRECTIONS = {FORWARD: "fwd", BOTH: "fwd + bwd", "backward": "bwd"}
#: Lines of the tables and plots of scaling, and the groups whose best each is.
LINES = {
    "fastcompress": OURS,
    "best torch.compile form": "compile",
    "best eager form": "eager",
    "AvgPool1d, fixed windows": "less work",
    BOUND: BOUND,
}


def figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table: the first line is its head, the first column is left-aligned, the others right-aligned."""
    align = ["left", *["right"] * (len(lines[0]) - 1)]
    return tabulate(lines[1:], lines[0], "pipe", disable_numparse=True, colalign=align)


def _fields(row: Any) -> Mapping[str, Any]:
    """The fields of a row or of a named tuple of one."""
    fields: Mapping[str, Any] = row if isinstance(row, pd.Series) else row._asdict()
    return fields


def setting(row: Any, threads: bool = True) -> str:
    """The head of a column: dtype, direction, and threads if there are any."""
    row = _fields(row)
    names = [DTYPES.get(row["dtype"], row["dtype"]), DIRECTIONS[row["direction"]]]
    return ", ".join(names + ([f"{row['threads']} thr"] if threads and row["threads"] else []))


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have times, with columns ``setting`` and ``times``, the multiple of our time in the same table.

    A table that was measured in stages, each against ours, is one: the first of our rows counts.
    """
    rows = rows[rows["median"].notna()].copy()
    rows["setting"] = [setting(row) for row in rows.itertuples()]
    stages = [*TABLE, "stage"] if "stage" in rows else TABLE
    ours = rows[rows["group"] == OURS].drop_duplicates(stages).set_index(stages)["median"]
    rows["times"] = rows["median"].to_numpy() / ours.reindex(pd.MultiIndex.from_frame(rows[stages])).to_numpy()
    return rows.drop_duplicates([*TABLE, "contender"])


def matrix(rows: pd.DataFrame, first: str | None = None) -> str:
    """One column per setting; our milliseconds and GB/s, and the other forms as multiples of our time.

    Args:
        rows: One case, from ``timed``.
        first: Form that the others are multiples of, if not ours.
    """
    columns = list(dict.fromkeys(rows["setting"]))
    median = rows.pivot(index="contender", columns="setting", values="median")[columns]
    first = first or str(rows.loc[rows["group"] == OURS, "contender"].iloc[0])
    multiples = rows.pivot(index="contender", columns="setting", values="times")[columns]
    if first not in rows.loc[rows["group"] == OURS, "contender"].to_numpy():
        multiples = median / median.loc[first]
    lines = [["", *columns], [f"{first}, ms", *(f"**{figure(value * 1e3)}**" for value in median.loc[first])]]
    if "call" in rows:
        calls = rows[rows["contender"] == first].set_index("setting")["call"].reindex(columns)
        lines.append([f"{first}, end to end, ms", *("" if pd.isna(one) else figure(one * 1e3) for one in calls)])
    if "moved" in rows:
        rates = rows.assign(rate=rows["moved"] / rows["median"] / 1e9).pivot(
            index="contender", columns="setting", values="rate"
        )[columns]
        for name in (first, CLONE, FRESH):
            if name in rates.index and rates.loc[name].notna().any():
                lines.append([f"{name}, GB/s", *("" if pd.isna(one) else figure(one) for one in rates.loc[name])])
    for name, values in multiples.drop(first).assign(middle=multiples.median(axis=1)).sort_values("middle").iterrows():
        cells = ["" if pd.isna(value) else f"{figure(value)}x" for value in values[columns]]
        lines.append([str(name), *cells])
    return markdown(lines)


def best(rows: pd.DataFrame, *groups: str, column: str = "median") -> pd.Series[Any] | None:
    """The fastest row of some groups."""
    some = rows[rows["group"].isin(groups) & rows[column].notna()]
    return None if some.empty else some.loc[some[column].idxmin()]


def line(rows: pd.DataFrame, name: str) -> pd.Series[Any] | None:
    """The row of one of ``LINES`` in a table: the best at the 10th percentile; the bound is that in fresh memory."""
    if LINES[name] == BOUND:
        rows = rows[rows["contender"] == FRESH]
    return best(rows, LINES[name], column="p10")


def with_places(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``scaling``, once per axis, with columns ``axis`` and ``place``; axes with one place are left out."""
    rows = rows.explode("axes").rename(columns={"axes": "axis"})
    rows["place"] = [
        scaling.value(row.axis, row.frames, row.dim, row.tokens, row.window, row.threads) for row in rows.itertuples()
    ]
    counts = rows.groupby("axis")["place"].transform("nunique")
    return rows[counts > 1].sort_values("place", kind="stable")


def place_text(place: float) -> str:
    """A place on an axis as a label: lengths of segments are fractions, all else is counted."""
    return f"{place:,.0f}" if place >= 10 else f"{place:.2g}"


def limits(rows: pd.DataFrame) -> dict[int, Mapping[str, float]]:
    """Rates of the machine by number of threads."""
    found = rows[rows["suite"] == roofline.NAME]
    return {
        int(str(threads)): dict(zip(one["contender"], one["rate"], strict=True))
        for threads, one in found.groupby("threads")
    }


def work(row: Any) -> tuple[float, float]:
    """Operations per byte and operations per second of a row of ``segment_pool``."""
    row = _fields(row)
    shape = int(row["frames"]), int(row["dim"]), int(row["tokens"]), row["direction"]
    operations = roofline.operations(*shape, scores=row["group"] != "less work")
    return operations / row["moved"], operations / row["median"]


def roof(rates: Mapping[str, float], intensity: float) -> float:
    """Operations per second that the limits allow at some operations per byte."""
    bandwidth = max(rates[roofline.READ], rates[roofline.COPY])
    return min(rates[roofline.SEPARATE], bandwidth * intensity)
