"""The plots of ``report.md``, from the same results. Each file carries a digest of what it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to files, without a display

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from benchmarks import document  # noqa: E402
from benchmarks.report import DTYPES  # noqa: E402
from benchmarks.suites import pack as packing  # noqa: E402

#: By the name of a line in ``document.LINES``: colours that differ in lightness too, and a marker each.
STYLES: dict[str, dict[str, Any]] = dict(
    zip(
        (name for name, _ in document.LINES),
        (
            {"color": "#c1272d", "marker": "o", "linewidth": 2.2},
            {"color": "#0000a7", "marker": "s"},
            {"color": "#008176", "marker": "^"},
            {"color": "#b8860b", "marker": "D"},
            {"color": "#777777", "marker": "", "linestyle": "--"},
        ),
        strict=True,
    )
)


def digest(parts: Any) -> str:
    """Of what is drawn."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def sources(slug: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The name of each plot and what it is drawn from."""
    found: dict[str, Any] = {}
    for table in parts.get("scaling", []):
        found.setdefault(f"{slug}-scaling-{table['direction']}.png", []).append(table)
    if "ceilings" in parts and "tables" in parts:
        found[f"{slug}-roofline.png"] = {key: parts.get(key) for key in ("ceilings", "tables", "packing")}
    return found


def write(folder: Path, slug: str, parts: Mapping[str, Any]) -> Iterator[Path]:
    """Draws all plots of a machine."""
    folder.mkdir(exist_ok=True)
    for name, drawn in sources(slug, parts).items():
        figure = _scaling(drawn) if "scaling" in name else _roofline(drawn)
        figure.savefig(folder / name, dpi=90, metadata={"Source": digest(drawn), "Software": None})
        plt.close(figure)
        yield folder / name


def _scaling(tables: document.Tables) -> Any:
    """A panel a dtype and axis: GB/s against what changes."""
    axes = list(dict.fromkeys(axis for table in tables for axis in table["axes"]))
    # An axis of one place shows nothing.
    axes = [axis for axis in axes if len({document.place(t, axis) for t in tables if axis in t["axes"]}) > 1]
    dtypes = list(dict.fromkeys(table["dtype"] for table in tables))
    figure, panels = plt.subplots(
        len(dtypes),
        len(axes),
        figsize=(max(10.5, 3.1 * len(axes)), 2.7 * len(dtypes) + 0.5),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for dtype, row in zip(dtypes, panels, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            on_axis = [table for table in tables if table["dtype"] == dtype and axis in table["axes"]]
            _scaling_panel(panel, sorted(on_axis, key=lambda table: document.place(table, axis)), axis)
        row[0].set_ylabel(f"{DTYPES[dtype]}, GB/s")
        row[0].set_ylim(bottom=0)  # after all of the row has been drawn, whose panels share the scale
    handles = [Line2D([], [], label=name, **style) for name, style in STYLES.items()]
    threads = sorted({table["threads"] for table in tables})
    title = f"{tables[0]['direction']}, {' and '.join(map(str, threads))} thread" + ("s" if threads[-1] > 1 else "")
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, title=title)
    return figure


def _scaling_panel(panel: Axes, tables: document.Tables, axis: str) -> None:
    places = [document.place(table, axis) for table in tables]
    for name, groups in document.LINES:
        times = [document.line(table, groups) for table in tables]
        pairs = zip(tables, times, strict=True)
        rates = [np.nan if time is None else table["bytes_moved"] / time / 1e9 for table, time in pairs]
        panel.plot(places, rates, markersize=5, **STYLES[name])
    panel.set_xscale("log", base=10 if axis == "frames" else 2)
    panel.set_xticks(places, [document.place_text(table, axis) for table in tables], fontsize=8)
    panel.minorticks_off()
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)


#: How markers of the roofline are filled.
_FILLS = {"forward": "full", "forward+backward": "none"}


def _roofline(parts: Mapping[str, Any]) -> Any:
    """A panel a number of threads, pooling; and one of packing, which computes nothing."""
    ceilings = {one["threads"]: one for one in parts["ceilings"]}
    width = len(ceilings) + (parts["packing"] is not None)
    figure, panels = plt.subplots(1, width, figsize=(4.8 * width, 4.8), squeeze=False, layout="constrained")
    for panel, (threads, one) in zip(panels[0], ceilings.items(), strict=False):
        tables = [t for t in parts["tables"] if t["threads"] == threads and t["case"] == parts["tables"][0]["case"]]
        _roofline_panel(panel, one, tables)
    if parts["packing"] is not None:
        forward = [t for t in parts["packing"] if t["direction"] == "forward" and t["threads"] in ceilings]
        _packing_panel(panels[0][-1], ceilings, forward[: len(ceilings)])
    figure.legend(handles=_roofline_handles(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _roofline_panel(panel: Axes, ceilings: Mapping[str, Any], tables: document.Tables) -> None:
    intensities = np.geomspace(0.1, 10, 200)
    roof = [document.roof_at(ceilings, x) / 1e9 for x in intensities]
    panel.plot(intensities, roof, color="black", linewidth=1.5)
    fused = ceilings["fused_operations_per_second"] / 1e9
    panel.axhline(fused, color="black", linewidth=0.8, linestyle=":")
    panel.annotate("fused multiply-add", (10, fused), ha="right", va="bottom", fontsize=8)
    for table in tables:
        for name, groups in document.LINES[:-1]:
            row = document.best(table, *groups)
            if row is None:
                continue
            intensity, rate = document.work_of(table, row["contender"])
            color, marker = STYLES[name]["color"], "o" if table["dtype"] == "float32" else "s"
            style = _FILLS[table["direction"]]
            panel.plot(intensity, rate / 1e9, color=color, marker=marker, markersize=8, fillstyle=style, linestyle="")
    panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="Gop/s")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_title(f"segment_pool, {tables[0]['case']}, {ceilings['threads']} thr" if tables else "")
    panel.grid(alpha=0.3, which="both")


def _roofline_handles() -> list[Line2D]:
    """Of the legend: colours are forms, markers dtypes and directions."""
    handles = [
        Line2D([], [], label=name, color=STYLES[name]["color"], marker="o", linestyle="")
        for name, _ in document.LINES[:-1]
    ]
    for label, marker, style in (
        ("fp32, forward", "o", "full"),
        ("fp32, forward + backward", "o", "none"),
        ("bf16, forward", "s", "full"),
        ("bf16, forward + backward", "s", "none"),
    ):
        shape: dict[str, Any] = {"color": "#444444", "marker": marker, "fillstyle": style, "linestyle": ""}
        handles.append(Line2D([], [], label=label, **shape))
    return handles


def _packing_panel(panel: Axes, ceilings: Mapping[int, Mapping[str, Any]], tables: document.Tables) -> None:
    names = [row["form"] for row in tables[0]["rows"]]
    names.sort(key=lambda name: document.seconds_of(tables[0], name), reverse=True)
    height = 0.8 / len(tables)
    for i, table in enumerate(tables):
        rates = [table["bytes_moved"] / document.seconds_of(table, name) / 1e9 for name in names]
        shade = 1 - 0.45 * i / max(1, len(tables) - 1)
        colors = ["#c1272d" if name == packing.OURS else "#0000a7" for name in names]
        label = document.setting(table)
        bars = panel.barh(np.arange(len(names)) - i * height, rates, height, color=colors, alpha=shade, label=label)
        panel.bar_label(bars, labels=[f"{rate:.1f}" for rate in rates], fontsize=7, padding=2)
        copy = ceilings[table["threads"]]["copy_bytes_per_second"] / 1e9
        panel.axvline(copy, color="black", linewidth=1, linestyle=("-", "--")[i % 2])
        panel.annotate(f"copy, {table['threads']} thr", (copy, 0.2 * i - 0.3), rotation=90, fontsize=7, ha="right")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_xlabel("GB/s, rows read and written")
    threads = " and ".join(f"{table['threads']} thr" for table in tables)
    panel.set_title(f"pack, {tables[0]['case']['name']}, {DTYPES[tables[0]['dtype']]}, forward, {threads}", fontsize=10)
