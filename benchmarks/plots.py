"""The plots of ``report.md``. Each file carries a digest of what it was drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")  # draws to files, without a display

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from benchmarks.harness import machine  # noqa: E402
from benchmarks.measurement import BOTH, BOUND, DTYPES, FORWARD, OURS, Results  # noqa: E402
from benchmarks.suites import pack, roofline, scaling, segment_pool  # noqa: E402
from benchmarks.tables import LINES, best, limits, line, place_text, roof, setting, with_places, work  # noqa: E402

#: By the name of a line: colours that differ in lightness too, and a marker each.
STYLES: dict[str, dict[str, Any]] = dict(
    zip(
        LINES,
        (
            {"color": "#c1272d", "marker": "o", "linewidth": 2.2},
            {"color": "#0000a7", "marker": "s"},
            {"color": "#008176", "marker": "^"},
            {"color": "#b8860b", "marker": "D"},
            {"color": "#777777", "marker": "x", "linestyle": "--"},
        ),
        strict=True,
    )
)


def digest(rows: pd.DataFrame) -> str:
    """Digest of what is drawn."""
    text: str = rows.dropna(axis="columns", how="all").to_json(orient="records")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources(results: Results) -> dict[str, pd.DataFrame]:
    """The name of each plot and the rows that it is drawn from."""
    rows, found = results.rows, {}
    for direction in dict.fromkeys(results.suite(scaling.NAME)["direction"]):
        name = f"{results.name}-scaling-{direction}.png"
        found[name] = rows[(rows["suite"] == scaling.NAME) & (rows["direction"] == direction)]
    suites = {roofline.NAME, segment_pool.NAME}
    if suites <= set(rows["suite"]) and any(roofline.SEPARATE in rates for rates in limits(rows).values()):
        found[f"{results.name}-roofline.png"] = rows[rows["suite"].isin(suites | {pack.NAME})]
    return found


def write(folder: Path, results: Results) -> Iterator[Path]:
    """Draw all plots of a machine."""
    folder.mkdir(exist_ok=True)
    for name, rows in sources(results).items():
        title = machine.title(results.machine)
        figure = _scaling(with_places(rows), title) if "-scaling-" in name else _roofline(rows, title)
        figure.savefig(folder / name, dpi=90, metadata={"Source": digest(rows), "Software": None})
        plt.close(figure)
        yield folder / name


def _scaling(rows: pd.DataFrame, title: str) -> Any:
    """One panel per dtype and axis: GB/s against what changes."""
    axes, dtypes = list(dict.fromkeys(rows["axis"])), list(dict.fromkeys(rows["dtype"]))
    axes.sort(key=[axis.name for axis in scaling.AXES].index)
    size = (max(10.5, 3.1 * len(axes)), 2.7 * len(dtypes) + 1.0)
    figure, panels = plt.subplots(
        len(dtypes), len(axes), figsize=size, squeeze=False, sharey="row", sharex="col", layout="constrained"
    )
    for dtype, row in zip(dtypes, panels, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            on_axis = rows[(rows["dtype"] == dtype) & (rows["axis"] == axis)]
            _scaling_panel(panel, [table for _, table in on_axis.groupby("place")], axis)
        row[0].set_ylabel(f"{DTYPES[dtype]}, GB/s")
        row[0].set_ylim(bottom=0)  # after all of the row has been drawn, whose panels share the scale
    for axis, panel in zip(axes, panels[-1], strict=True):
        panel.set_xlabel(axis)
    handles = [Line2D([], [], label=name, **style) for name, style in STYLES.items()]
    threads = sorted(set(rows["threads"]))
    on = f", {threads[-1]} threads (axis threads: {', '.join(map(str, threads))})" if threads[-1] else ""
    figure.suptitle(
        f"segment_pool, {rows['direction'].iloc[0].replace('+', ' + ')}: {title}{on}\n"
        "marks: 10th percentile of the times; bars: down to the 90th percentile",
        fontsize=11,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _scaling_panel(panel: Axes, tables: list[pd.DataFrame], axis: str) -> None:
    places = [float(table["place"].iloc[0]) for table in tables]
    apart = (places[-1] / places[0]) ** 0.012  # so that bars of one place do not hide each other
    for i, (name, style) in enumerate(STYLES.items()):
        found = [line(table, name) for table in tables]
        fast, slow = (
            np.array([np.nan if one is None else one["moved"] / one[key] / 1e9 for one in found])
            for key in ("p10", "p90")
        )
        where = [place * apart ** (i - 2) for place in places]
        panel.errorbar(where, fast, (fast - slow, 0 * fast), markersize=5, elinewidth=0.8, capsize=2, **style)
    panel.set_xscale("log", base=10 if axis == scaling.FRAMES else 2)
    panel.set_xticks(places, [place_text(place) for place in places], fontsize=8)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


#: How markers of the roofline are filled.
_FILLS = {FORWARD: "full", BOTH: "none"}


def _roofline(rows: pd.DataFrame, title: str) -> Any:
    """One panel of pooling per number of threads; and one of packing, which computes nothing."""
    found = {threads: rates for threads, rates in limits(rows).items() if roofline.SEPARATE in rates}
    pooled, packed = rows[rows["suite"] == segment_pool.NAME], rows[rows["suite"] == pack.NAME]
    packed = packed[(packed["direction"] == FORWARD) & packed["threads"].isin(found)]
    width = len(found) + (not packed.empty)
    figure, panels = plt.subplots(1, width, figsize=(4.8 * width, 5.4), squeeze=False, layout="constrained")
    case = pooled["case"].iloc[0]
    for panel, (threads, rates) in zip(panels[0], found.items(), strict=False):
        _roofline_panel(panel, rates, pooled[(pooled["threads"] == threads) & (pooled["case"] == case)])
        panel.set_title(f"segment_pool, {case}, {threads} thr", fontsize=10)
    if not packed.empty:
        one = packed[(packed["case"] == packed["case"].iloc[0]) & (packed["dtype"] == packed["dtype"].iloc[0])]
        _pack_panel(panels[0][-1], found, one)
    figure.suptitle(f"{title}\nmarks: medians; bars: 10th to 90th percentile of the times", fontsize=11)
    figure.legend(handles=_roofline_handles(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _roofline_panel(panel: Axes, rates: Any, rows: pd.DataFrame) -> None:
    intensities = np.geomspace(0.1, 10, 200)
    panel.plot(intensities, [roof(rates, x) / 1e9 for x in intensities], color="black", linewidth=1.5)
    fused = rates[roofline.FUSED] / 1e9
    panel.axhline(fused, color="black", linewidth=0.8, linestyle=":")
    panel.annotate(roofline.FUSED, (10, fused), ha="right", va="bottom", fontsize=8)
    for (dtype, direction), table in rows.groupby(["dtype", "direction"], sort=False):
        for name, group in LINES.items():
            one = best(table, group) if group != BOUND else None
            if one is None:
                continue
            intensity, rate = work(one)
            low, high = (rate * (one["median"] / one[key]) / 1e9 for key in ("p90", "p10"))
            marker = "o" if dtype == "float32" else "s"
            panel.errorbar(
                intensity, rate / 1e9, [[rate / 1e9 - low], [high - rate / 1e9]], color=STYLES[name]["color"],
                marker=marker, markersize=7, fillstyle=_FILLS[str(direction)], linestyle="", elinewidth=0.8, capsize=2,
            )  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3, which="both")


def _roofline_handles() -> list[Line2D]:
    """Colours are forms; markers are dtypes, and their filling is the direction."""
    handles = [
        Line2D([], [], label=name, color=style["color"], marker="o", linestyle="")
        for name, style in STYLES.items()
        if name != BOUND
    ]
    for label, marker, fill in (
        ("fp32, forward", "o", "full"),
        ("fp32, forward + backward", "o", "none"),
        ("bf16, forward", "s", "full"),
        ("bf16, forward + backward", "s", "none"),
    ):
        handles.append(Line2D([], [], label=label, color="#444444", marker=marker, fillstyle=fill, linestyle=""))  # type: ignore[arg-type]
    return handles


def _pack_panel(panel: Axes, found: Any, rows: pd.DataFrame) -> None:
    """Labelled bars, one per form and number of threads."""
    tables = [table.set_index("contender") for _, table in rows.groupby("threads")]
    names = tables[0]["median"].sort_values(ascending=False).index
    height = 0.8 / len(tables)
    for i, table in enumerate(tables):
        table = table.loc[names]
        rates, fast, slow = (table["moved"] / table[key] / 1e9 for key in ("median", "p10", "p90"))
        colors = ["#c1272d" if group == OURS else "#5577bb" for group in table["group"]]
        where = np.arange(len(names)) - i * height
        error = {"elinewidth": 0.7, "capsize": 1.5, "ecolor": "#333333"}
        bars = panel.barh(where, rates, height, color=colors, alpha=1 - 0.45 * i / max(1, len(tables) - 1))
        panel.errorbar(rates, where, xerr=(rates - slow, fast - rates), linestyle="", **error)  # type: ignore[arg-type]
        threads = int(table["threads"].iloc[0])
        for bar, value in zip(bars, fast, strict=True):
            label = f"{bar.get_width():.1f} ({threads} thr)"
            panel.annotate(
                label, (value, bar.get_y() + height / 2), (3, 0), textcoords="offset points", va="center", fontsize=6
            )
        copy = found[threads][roofline.COPY] / 1e9
        panel.axvline(copy, color="black", linewidth=1, linestyle=("-", "--")[i % 2])
        panel.annotate(f"copy, {threads} thr", (copy, 0.2 * i - 0.3), rotation=90, fontsize=7, ha="right")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_xlabel("GB/s, rows read and written")
    panel.set_title(f"pack, {tables[0]['case'].iloc[0]}, {setting(rows.iloc[0], threads=False)}", fontsize=10)
