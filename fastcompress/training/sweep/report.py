"""Table, JSON, hypotheses and plot of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcompress.files import write_file
from fastcompress.training.manifest import Utterance
from fastcompress.training.scores import ErrorCounts
from fastcompress.training.sweep.measure import Row
from fastcompress.training.sweep.models import NONE
from fastcompress.training.sweep.scores import Comparison, Score, is_uniform

_HEAD = (
    "", "keys", "tokens/s", "frames/token", "WER %", "95 %", "S", "D", "I", "CER %", "vs none", "95 %",
    "vs uniform", "95 %", "prefill ms", "decoding ms",
)  # fmt: skip
_COLOURS = ("tab:gray", "tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:pink")
_MARKERS = "os^DvPX*"


def table(scores: Sequence[Score], style: str = "plain") -> str:
    """Return the scores as a table of ``tabulate``, in plain text or with style ``"pipe"`` as Markdown."""
    from tabulate import tabulate

    head = list(_HEAD)
    has_bleu = any(s.bleu is not None for s in scores)
    if has_bleu:
        head.insert(head.index("CER %") + 1, "BLEU")
    rows = []
    for s in scores:
        cells = [
            s.label, f"{s.keys:.0f}", f"{s.tokens_per_second:.1f}", f"{s.frames_per_token:.2f}", f"{s.wer.value:.2f}",
            f"{s.wer.low:.1f} to {s.wer.high:.1f}", str(s.substitutions), str(s.deletions), str(s.insertions),
            f"{s.cer:.2f}", *_cells(s.vs_none), *_cells(s.vs_uniform), f"{s.prefill_ms:.1f}", f"{s.decoding_ms:.1f}",
        ]  # fmt: skip
        if has_bleu:
            cells.insert(head.index("BLEU"), f"{s.bleu:.1f}")
        rows.append(cells)
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, style, disable_numparse=True, colalign=align)


def _cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", ""]
    mark = "~" if found.against.startswith("between ") else ""
    return [
        f"{mark}{found.interval.value:+.2f}",
        f"{found.interval.low:+.1f} to {found.interval.high:+.1f}",
    ]


def notes(scores: Sequence[Score], unit: str, units: int, skipped: int) -> list[str]:
    """Return sentences that explain a table."""
    found = [
        f"{scores[0].utterances} utterances, {scores[0].words} words"
        + (f"; {skipped} utterances without usable audio were skipped." if skipped else "."),
        f"Intervals: paired bootstrap, 10,000 resamples of the {units} {unit}s.",
        "keys: rows to which the decoder attends per utterance, before the first new token.",
    ]
    if any(s.vs_uniform is not None for s in scores):
        found.append(
            "vs uniform: uniform pooling with the same parts at the same tokens per second; ~ is interpolated between "
            "the two nearest rates."
        )
    if clipped := [f"{s.label} ({s.clipped})" for s in scores if s.clipped]:
        found.append(f"Texts that --new-tokens cut: {', '.join(clipped)}.")
    return found


def write(
    out: Path,
    title: str,
    facts: dict[str, Any],
    scores: Sequence[Score],
    rows: Sequence[Row],
    counts: Sequence[Sequence[ErrorCounts]],
    utterances: Sequence[Utterance],
    lines: Sequence[str],
) -> None:
    """Write ``sweep.md``, ``sweep.json``, ``sweep.png`` and ``hypotheses/`` into a folder.

    Args:
        out: The folder.
        title: Name of model and data.
        facts: Further values of ``sweep.json``.
        scores: Scores of the rows.
        rows: The rows.
        counts: Errors of each utterance, for each row.
        utterances: The utterances.
        lines: Sentences that explain the table.
    """
    pictured = f"![Word error rate against tokens per second]({_NAME}.png)"
    text = "\n".join([f"# {title}", "", table(scores, "pipe"), "", *(f"* {line}" for line in lines), "", pictured, ""])
    write_file(out / f"{_NAME}.md", text)
    values = facts | {"rows": [s.to_dict() for s in scores]}
    write_file(out / f"{_NAME}.json", json.dumps(values, indent=1, ensure_ascii=False))
    folder = out / "hypotheses"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9]-*.jsonl"):  # they may be from another list of rules
        old.unlink()
    for number, (score, row, errors) in enumerate(zip(scores, rows, counts, strict=True)):
        name = "".join(c if c.isalnum() else "-" for c in score.label)
        found = []
        for u, answer, count in zip(utterances, row.answers, errors, strict=True):
            values = {"audio_filepath": str(u.audio_filepath), "reference": u.target, "hypothesis": answer.text}
            values |= {"substitutions": count.substitutions, "deletions": count.deletions}
            values |= {"insertions": count.insertions, "words": count.length, "keys": answer.keys}
            found.append(json.dumps(values, ensure_ascii=False))
        write_file(folder / f"{number:02d}-{name[:80]}.jsonl", "".join(f"{line}\n" for line in found))
    plot(scores, out / f"{_NAME}.png", title)


_NAME = "sweep"


def plot(scores: Sequence[Score], path: Path, title: str) -> None:
    """Draw word error rate against tokens per second, one line per kind of rule, with 95 % intervals.

    Args:
        scores: Scores of the rows.
        path: PNG file to write.
        title: Title of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        kinds.setdefault(_kind(score), []).append(score)
    lowest = min(s.wer.value for s in scores)
    top = 1.5 * max(s.wer.value for s in scores if s.wer.value <= 2 * lowest + 5)  # a failure must not hide the rest
    step = min(0.03, 0.1 / max(1, len(kinds) - 1))
    for number, (kind, same) in enumerate(kinds.items()):
        same = sorted(same, key=lambda s: s.tokens_per_second)
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        apart = 1 + step * (number - (len(kinds) - 1) / 2)  # so that points of equal rates do not overlap
        rates = [s.tokens_per_second * apart for s in same]
        values = [min(s.wer.value, 0.94 * top) for s in same]
        # Rows above the picture are drawn at its edge, with their value.
        ends = [min(max(s.wer.high, v), 0.94 * top) for s, v in zip(same, values, strict=True)]
        bars = [
            [v - min(s.wer.low, v) for s, v in zip(same, values, strict=True)],
            [end - v for end, v in zip(ends, values, strict=True)],
        ]
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 1,
            "markersize": 6,
            "capsize": 2,
            "elinewidth": 1,
            "alpha": 0.9,
        }
        axis.errorbar(rates, values, bars, fmt=f"{marker}-", label=kind, **style)
        for s, x, end in zip(same, rates, ends, strict=True):
            place: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8, "color": colour}
            axis.annotate(f"{s.wer.value:.1f}", (x, end), (0, 3), textcoords="offset points", **place)
        if kind == NONE:
            axis.axhline(same[0].wer.value, color=colour, linestyle="--", linewidth=1)
    ticks = _apart(scores)
    axis.set(xscale="log", ylabel="word error rate, %", title=title)
    axis.set_xlabel("tokens per second (frames per token)")
    labels = [f"{s.tokens_per_second:.1f}\n({s.frames_per_token:.1f}x)" for s in ticks]
    axis.set_xticks([s.tokens_per_second for s in ticks], labels)
    axis.minorticks_off()
    axis.set_ylim(0, top)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _kind(score: Score) -> str:
    """Return the name of a row's line in the plot: the kind of its rule, and its settings."""
    _, comma, parts = score.label.removeprefix(score.variant.rule).partition(", ")
    name = score.variant.rule.partition(":")[0]
    if is_uniform(score.variant):
        name = "uniform"
    return f"{name}{comma}{parts}"


def _apart(scores: Sequence[Score]) -> list[Score]:
    """Return scores whose tokens per second differ by more than a fifth, from low to high."""
    found: list[Score] = []
    for score in sorted(scores, key=lambda s: s.tokens_per_second):
        if not found or score.tokens_per_second > 1.2 * found[-1].tokens_per_second:
            found.append(score)
    return found
