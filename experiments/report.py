"""Write the results of all seeds as a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.study import METHODS, spread

STAGES = {
    "zero-shot": "no training for the compression",
    "lora": "LoRA on the frame-level model",
    "start": "compression from scratch",
}
#: Names of test sets in tables.
HEADS = {"test": "test", "test-voice": "new voices", "test-noise": "more noise", "test-engine": "other engine"}


def load(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows in the files that ``experiments.study.Study`` wrote."""
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the rows of all seeds, grouped by task, stage and compression."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["stage"], row["compression"]), []).append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one Markdown table per task and stage.

    The columns are word error rates as mean and standard deviation over the seeds, the 95 % interval of the first test
    set over its utterances (the mean over the seeds), and the share of utterances without an error. A dash means that
    a test set was not scored, for example because its synthesizer was not installed."""
    sets = [name for name in HEADS if any(name in row["scores"] for row in rows)]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        seeds = sorted({row["seed"] for row in of_task})
        words = of_task[0]["scores"]["test"]["words"]
        lines += [
            f"**{task}**: {len(seeds)} seeds, {words} words per test set. Word error rates are in %, as mean ± "
            "standard deviation over the seeds; 95 % is the interval over the utterances of the test set.",
            "",
        ]
        heads = ["", "tokens/s", "ratio", *(HEADS[name] for name in sets), "exact %", "prefill ms"]
        heads.insert(heads.index("test") + 1, "95 %")
        for stage, title in STAGES.items():
            of_stage = {c: same for (_, s, c), same in groups(of_task).items() if s == stage}
            if not of_stage:
                continue
            table = []
            for compression, same in of_stage.items():
                cells = [compression, _mean(same, "test", "tokens_per_second", 1), _mean(same, "test", "ratio", 2)]
                for name in sets:
                    if any(name not in row["scores"] for row in same):
                        cells.append("–")
                        continue
                    mean, deviation = spread([row["scores"][name]["wer"] for row in same])
                    cells.append(f"{mean:.1f} ± {deviation:.1f}")
                    if name == "test":
                        cells.append(f"{_mean(same, name, 'wer_low', 1)} to {_mean(same, name, 'wer_high', 1)}")
                cells += [_mean(same, "test", "exact", 1), _mean(same, "test", "prefill_ms", 1)]
                table.append(cells)
            align = ("left", *["right"] * (len(heads) - 1))
            lines += [f"*{title}*", "", tabulate(table, heads, "pipe", colalign=align, disable_numparse=True), ""]
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], name: str, field: str, digits: int) -> str:
    return f"{spread([row['scores'][name][field] for row in rows])[0]:.{digits}f}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot error against tokens per second, one panel per task and test set; bars span the lowest to highest seed."""
    colours = {"lora": "tab:blue", "start": "tab:green"}
    markers = {
        "every frame": "o",
        "uniform pooling": "s",
        "uniform sampling": "v",
        "local maxima": "^",
        "CTC change": "D",
    }
    methods = {method.name for method in METHODS}

    def draw(axis: Any, of_task: dict[tuple[str, str, str], list[dict[str, Any]]], name: str) -> None:
        for (_, stage, compression), same in of_task.items():
            if stage not in colours or compression in methods:
                continue
            marker = next(m for kind, m in markers.items() if compression.startswith(kind))
            short = compression.replace("uniform pooling ", "").replace("uniform ", "")
            offset = (-18, -12) if short.endswith("x") and " " not in short else (6, 4)
            _point(axis, same, name, short, marker, colours[stage], offset)
        for stage in dict.fromkeys(stage for _, stage, _ in of_task if stage in colours):
            axis.plot([], [], "s", color=colours[stage], label=STAGES[stage])

    _panels(rows, path, draw)


def plot_methods(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the published methods after LoRA, numbered as in the legend, with uniform pooling as a line.

    The error axis is logarithmic, since many methods are close together at 3 frames per token and a few far above.
    """
    methods = ["local maxima", *(method.name for method in METHODS)]

    def draw(axis: Any, of_task: dict[tuple[str, str, str], list[dict[str, Any]]], name: str) -> None:
        pooling = []
        for (_, stage, compression), same in of_task.items():
            if stage != "lora":
                continue
            if compression in methods:
                number = str(methods.index(compression) + 1)
                axis.plot([], [], linestyle="", marker=f"${number}$", color="tab:blue", markersize=8, label=compression)
                _point(axis, same, name, number, ".", "tab:blue")
            elif compression == "every frame" or compression.startswith("uniform pooling"):
                _point(axis, same, name, "", "s", "tab:gray")
                scores = [row["scores"][name] for row in same]
                pooling.append(tuple(spread([s[key] for s in scores])[0] for key in ("tokens_per_second", "wer")))
        axis.plot(*zip(*sorted(pooling), strict=True), color="tab:gray", label="uniform pooling: 1x to 4x")
        axis.set_yscale("log", nonpositive="clip")
        axis.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axis.minorticks_off()

    _panels(rows, path, draw, from_zero=False)


def _point(
    axis: Any,
    same: Sequence[dict[str, Any]],
    name: str,
    label: str,
    marker: str,
    colour: str,
    offset: tuple[int, int] = (6, 4),
) -> None:
    errors = [row["scores"][name]["wer"] for row in same]
    rate, mean = spread([row["scores"][name]["tokens_per_second"] for row in same])[0], spread(errors)[0]
    axis.errorbar(
        rate, mean, yerr=[[mean - min(errors)], [max(errors) - mean]], fmt=marker, color=colour, capsize=3, markersize=7
    )
    axis.annotate(label, (rate, mean), offset, textcoords="offset points", fontsize=8)


def _panels(
    rows: Sequence[dict[str, Any]],
    path: Path,
    draw: Callable[[Any, dict[tuple[str, str, str], list[dict[str, Any]]], str], None],
    from_zero: bool = True,
) -> None:
    """Draw one row of panels per task into ``path``, with one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(11, 4.2 * len(tasks)), squeeze=False, layout="constrained")
    for line, task in zip(axes, tasks, strict=True):
        of_task = groups([row for row in rows if row["task"] == task])
        for axis, name in zip(line, ("test", "test-voice"), strict=True):
            draw(axis, of_task, name)
            axis.set(
                xscale="log",
                xlabel="tokens per second of audio",
                ylabel="word error rate, %",
                title=f"{task}, {HEADS[name]}",
            )
            axis.set_xticks([6, 8, 10, 13, 17, 25, 50], ["6", "8", "10", "13", "17", "25", "50"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if from_zero:
                axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"Mean of {seeds} seeds; bars span the lowest to the highest seed", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
