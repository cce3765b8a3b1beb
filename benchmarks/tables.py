"""What the report and its plots share: figures derived from measurements, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.results import BOTH, BOUND, CLONE, DTYPES, FORWARD, MIX, OURS
from benchmarks.suites import roofline, scaling

FRESH = f"{BOUND}, fresh"
DIRECTIONS = {FORWARD: "fwd", BOTH: "fwd + bwd"}
#: Lines of the tables and plots of scaling, and the group whose best each is.
LINES = {
    "fastcompress": OURS,
    "best torch.compile form": "compile",
    "best eager form": "eager",
    "AvgPool1d, fixed windows": "less work",
    BOUND: BOUND,
}


def figure(value: float, form: str = "{}") -> str:
    """Format three digits, without an exponent, in a form; return "" for a missing value."""
    if pd.isna(value):
        return ""
    return form.format(f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip("."))


def markdown(table: pd.DataFrame) -> str:
    """Format a table of texts; the index is left-aligned, the columns are right-aligned."""
    align = ["left", *["right"] * table.shape[1]]
    return str(table.fillna("").to_markdown(tablefmt="pipe", disable_numparse=True, colalign=align))


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with times, with columns ``short``, the dtype and direction, and ``setting``, threads as well."""
    rows = rows[rows["median"].notna()].copy()
    rows["short"] = rows["dtype"].replace(DTYPES) + ", " + rows["direction"].map(DIRECTIONS)
    rows["setting"] = rows["short"] + rows["threads"].map(lambda threads: f", {threads} thr" if threads else "")
    return rows


def matrix(rows: pd.DataFrame, first: str | None = None) -> pd.DataFrame:
    """Return a column per setting: our milliseconds and GB/s, and the other forms as multiples of our time.

    Args:
        rows: One case, from ``timed``.
        first: Form that the others are multiples of, if not ours.
    """
    first = first or str(rows.loc[rows["group"] == OURS, "implementation"].iloc[0])
    wide = rows.assign(rate=rows["moved"] / rows["median"] / 1e9 if "moved" in rows else float("nan"))
    wide = wide.pivot(index="implementation", columns="setting")
    settings = rows["setting"].unique()
    median, rates = wide["median"][settings], wide["rate"][settings]
    table = {f"{first}, ms": (median.loc[first] * 1e3).map(lambda ms: figure(ms, "**{}**"))}
    if "call" in rows:
        table[f"{first}, end to end, ms"] = (wide["call"].loc[first, settings] * 1e3).map(figure)
    for name in (first, CLONE, MIX, FRESH):
        if name in rates.index and rates.loc[name].notna().any():
            table[f"{name}, GB/s"] = rates.loc[name].map(figure)
    times = (median / median.loc[first]).drop(first)
    for name in times.median(axis=1).sort_values().index:
        table[str(name)] = times.loc[name].map(lambda ratio: figure(ratio, "{}x"))
    return pd.DataFrame(table).T[settings]


def seconds(rows: pd.DataFrame, names: Sequence[str], by: Sequence[str]) -> pd.Series[float]:
    """Return the least median of the rows whose group or implementation has one of some names, by columns."""
    found = rows[rows["group"].isin(names) | rows["implementation"].isin(names)]
    return found.groupby(list(by), sort=False)["median"].min()


def fastest(rows: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Return the fastest row of each of ``LINES`` by columns, with a column ``line``; the bound is the fresh one."""
    rows = rows[(rows["group"] != BOUND) | (rows["implementation"] == FRESH)]
    rows = rows.assign(line=rows["group"].map({group: name for name, group in LINES.items()})).reset_index(drop=True)
    rows = rows.dropna(subset=["line", column])
    return rows.loc[rows.groupby([*by, "line"], sort=False)[column].idxmin()]


def with_places(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``scaling`` once per axis, with columns ``axis`` and ``place``, without axes of one place."""
    rows = timed(rows).explode("axes").rename(columns={"axes": "axis"})
    rows["place"] = [
        scaling.value(row.axis, row.frames, row.dim, row.tokens, row.window, row.threads) for row in rows.itertuples()
    ]
    counts = rows.groupby("axis")["place"].transform("nunique")
    return rows[counts > 1].sort_values("place", kind="stable")


def place_text(place: float) -> str:
    """Format a place on an axis."""
    return f"{place:,.0f}" if place >= 10 else f"{place:.2g}"


def limits(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rates of the machine: a row per number of threads, a column per limit; a GPU has copies alone."""
    columns = [roofline.READ, roofline.COPY, roofline.SEPARATE, roofline.FUSED]
    rates = rows[rows["suite"] == roofline.NAME]
    found = rates.pivot(index="threads", columns="implementation", values="rate") if len(rates) else pd.DataFrame()
    return found.reindex(columns=columns)


def with_work(rows: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """Return rows of ``segment_pool`` on threads whose limits are known, with columns ``intensity`` and ``speed``.

    These are operations per byte and operations per second.
    """
    rows = rows[rows["threads"].isin(rates.dropna().index)]
    shapes = zip(
        rows["frames"], rows["dim"], rows["tokens"], rows["direction"], rows["group"] != "less work", strict=True
    )
    done = pd.Series([roofline.operations(*shape) for shape in shapes], rows.index, dtype="float64")
    return rows.assign(intensity=done / rows["moved"], speed=done / rows["median"])


def roof(rates: pd.Series[float], intensity: float) -> float:
    """Return the operations per second that the limits allow at some operations per byte."""
    return float(min(rates[roofline.SEPARATE], max(rates[roofline.READ], rates[roofline.COPY]) * intensity))
