"""The plots of ``report.md``. Each file carries a digest of what it was drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.harness import machine
from benchmarks.results import BOUND, DTYPES, FORWARD, OURS, Results
from benchmarks.suites import pack, roofline, scaling, segment_pool
from benchmarks.tables import fastest, limits, place_text, roof, timed, with_places, with_work

#: By the name of a line: colours that differ in lightness too, and a marker each.
STYLES: dict[str, dict[str, Any]] = {
    "fastcompress": {"color": "#c1272d", "marker": "o", "linewidth": 2.2},
    "best torch.compile form": {"color": "#0000a7", "marker": "s"},
    "best eager form": {"color": "#008176", "marker": "^"},
    "AvgPool1d, fixed windows": {"color": "#b8860b", "marker": "D"},
    BOUND: {"color": "#777777", "marker": "x", "linestyle": "--"},
}
#: Markers of the roofline: a shape per dtype, hollow with the backward pass.
MARKS: dict[str, dict[str, Any]] = {
    "fp32, fwd": {"marker": "o"},
    "fp32, fwd + bwd": {"marker": "o", "fillstyle": "none"},
    "bf16, fwd": {"marker": "s"},
    "bf16, fwd + bwd": {"marker": "s", "fillstyle": "none"},
}
_BARS: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2}


def digest(rows: pd.DataFrame) -> str:
    """Return a digest of what is drawn."""
    text: str = rows.dropna(axis="columns", how="all").to_json(orient="records")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources(results: Results) -> dict[str, pd.DataFrame]:
    """Return the rows that each plot is drawn from, by its name."""
    rows, found = results.rows, {}
    for direction in results.suite(scaling.NAME)["direction"].unique():
        name = f"{results.name}-scaling-{direction}.png"
        found[name] = rows[(rows["suite"] == scaling.NAME) & (rows["direction"] == direction)]
    if segment_pool.NAME in set(rows["suite"]) and len(limits(rows).dropna()):
        found[f"{results.name}-roofline.png"] = rows[rows["suite"].isin([roofline.NAME, segment_pool.NAME, pack.NAME])]
    return found


def write(folder: Path, results: Results) -> Iterator[Path]:
    """Draw all plots of a machine."""
    folder.mkdir(exist_ok=True)
    for name, rows in sources(results).items():
        figure = Figure(layout="constrained")
        title = machine.title(results.machine)
        handles = _scaling(figure, rows, title) if "-scaling-" in name else _roofline(figure, rows, title)
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        figure.savefig(folder / name, dpi=90, metadata={"Source": digest(rows), "Software": None})
        yield folder / name


def _scaling(figure: Figure, rows: pd.DataFrame, title: str) -> list[Line2D]:
    """Draw a panel per dtype and axis, GB/s against what changes; return the legend."""
    rows = with_places(rows)
    axes = [axis for axis in scaling.AXES if axis in set(rows["axis"])]
    dtypes, threads = rows["dtype"].unique(), sorted(set(rows["threads"]))
    figure.set_size_inches(max(10.5, 3.1 * len(axes)), 2.7 * len(dtypes) + 1.0)
    panels = figure.subplots(len(dtypes), len(axes), squeeze=False, sharey="row", sharex="col")
    for dtype, row in zip(dtypes, panels, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            _scaling_panel(panel, rows[(rows["dtype"] == dtype) & (rows["axis"] == axis)], axis)
        row[0].set_ylabel(f"{DTYPES[dtype]}, GB/s")
        row[0].set_ylim(bottom=0)  # after all of the row has been drawn, whose panels share the scale
    for axis, panel in zip(axes, panels[-1], strict=True):
        panel.set_xlabel(axis)
    on = f", {threads[-1]} threads (axis threads: {', '.join(map(str, threads))})" if threads[-1] else ""
    figure.suptitle(
        f"segment_pool, {rows['direction'].iloc[0].replace('+', ' + ')}: {title}{on}\n"
        "marks: 10th percentile of the times; bars: down to the 90th percentile",
        fontsize=11,
    )
    return [Line2D([], [], label=name, **style) for name, style in STYLES.items()]


def _scaling_panel(panel: Axes, rows: pd.DataFrame, axis: str) -> None:
    places = sorted(set(rows["place"]))
    apart = (places[-1] / places[0]) ** 0.012  # so that bars of one place do not hide each other
    best = fastest(rows, ["place"], "p10").set_index("line")
    for i, (name, style) in enumerate(STYLES.items()):
        if name in best.index:
            line = best.loc[[name]].sort_values("place")
            fast, slow = (line["moved"] / line[key] / 1e9 for key in ("p10", "p90"))
            where = line["place"] * apart ** (i - 2)
            panel.errorbar(where, fast, (fast - slow, 0 * fast), markersize=5, **_BARS, **style)
    panel.set_xscale("log", base=10 if axis == scaling.FRAMES else 2)
    panel.set_xticks(places, [place_text(place) for place in places], fontsize=8)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _roofline(figure: Figure, rows: pd.DataFrame, title: str) -> list[Line2D]:
    """Draw a panel of pooling per number of threads, and one of packing; return the legend."""
    rates = limits(rows).dropna()
    rows = timed(rows[rows["threads"].isin(rates.index)])
    pooled = with_work(rows[rows["suite"] == segment_pool.NAME], rates)
    packed = rows[(rows["suite"] == pack.NAME) & (rows["direction"] == FORWARD)]
    width, case = len(rates) + (not packed.empty), pooled["case"].iloc[0]
    figure.set_size_inches(4.8 * width, 5.4)
    panels = figure.subplots(1, width, squeeze=False)[0]
    for panel, (threads, limit) in zip(panels, rates.iterrows(), strict=False):
        _roofline_panel(panel, limit, pooled[(pooled["threads"] == threads) & (pooled["case"] == case)])
        panel.set_title(f"segment_pool, {case}, {threads} thr", fontsize=10)
    if not packed.empty:
        one = packed.iloc[0]
        _pack_panel(panels[-1], rates, packed[(packed["case"] == one["case"]) & (packed["short"] == one["short"])])
        panels[-1].set_title(f"pack, {one['case']}, {one['short']}", fontsize=10)
    figure.suptitle(f"{title}\nmarks: medians; bars: 10th to 90th percentile of the times", fontsize=11)
    handles = [
        Line2D([], [], label=name, color=style["color"], marker="o", linestyle="")
        for name, style in STYLES.items()
        if name != BOUND
    ]
    return handles + [Line2D([], [], label=name, color="#444444", linestyle="", **mark) for name, mark in MARKS.items()]


def _roofline_panel(panel: Axes, rates: pd.Series[float], rows: pd.DataFrame) -> None:
    intensities = np.geomspace(0.1, 10, 200)
    panel.plot(intensities, [roof(rates, x) / 1e9 for x in intensities], color="black", linewidth=1.5)
    fused = rates[roofline.FUSED] / 1e9
    panel.axhline(fused, color="black", linewidth=0.8, linestyle=":")
    panel.annotate(roofline.FUSED, (10, fused), ha="right", va="bottom", fontsize=8)
    for one in fastest(rows[rows["group"] != BOUND], ["short"], "median").itertuples():
        low, speed, high = (one.speed * one.median / seconds / 1e9 for seconds in (one.p90, one.median, one.p10))
        style = {"color": STYLES[one.line]["color"], "linestyle": "", "markersize": 7} | MARKS[one.short] | _BARS
        panel.errorbar(one.intensity, speed, [[speed - low], [high - speed]], **style)
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3, which="both")


def _pack_panel(panel: Axes, rates: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Draw labelled bars, one per form and number of threads."""
    tables = {threads: table.set_index("implementation") for threads, table in rows.groupby("threads")}
    names = next(iter(tables.values()))["median"].sort_values(ascending=False).index
    height = 0.8 / len(tables)
    for i, (threads, table) in enumerate(tables.items()):
        table = table.loc[names]
        median, fast, slow = (table["moved"] / table[key] / 1e9 for key in ("median", "p10", "p90"))
        where = np.arange(len(names)) - i * height
        colors = ["#c1272d" if group == OURS else "#5577bb" for group in table["group"]]
        bars = panel.barh(
            where, median, height, color=colors, alpha=1 - 0.45 * i / max(1, len(tables) - 1),
            xerr=(median - slow, fast - median), error_kw={"elinewidth": 0.7, "capsize": 1.5, "ecolor": "#333333"},
        )  # fmt: skip
        panel.bar_label(bars, [f"{value:.1f} ({threads} thr)" for value in median], padding=3, fontsize=6)
        copy = float(rates.loc[threads, roofline.COPY]) / 1e9
        panel.axvline(copy, color="black", linewidth=1, linestyle=("-", "--")[i % 2])
        panel.annotate(f"copy, {threads} thr", (copy, 0.2 * i - 0.3), rotation=90, fontsize=7, ha="right")
    panel.set_yticks(range(len(names)), list(names), fontsize=8)
    panel.set_xlabel("GB/s, rows read and written")
