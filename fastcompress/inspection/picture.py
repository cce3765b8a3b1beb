"""Draw an inspection: spectrogram, distances, and the segments of every rule, aligned in time.

The module needs ``matplotlib`` (``pip install 'fastcompress[audio]'``).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from fastcompress.audio import FRAME_RATE, mel_centres
from fastcompress.inspection.table import Inspection, RuleResult

DEFAULT_SECONDS = 10.0  # at this length a 100 Hz frame is about one pixel wide

# All lengths are in inches of 100 pixels.
_DPI = 100
_WIDTH = 16.0
_LEFT, _RIGHT = 2.85, 2.95  # rule names; counts
_TITLE, _SPECTROGRAM, _DISTANCE, _GAP, _AXIS = 0.95, 2.5, 1.6, 0.16, 0.6
_COUNT_HEADER, _ROW, _ROW_GAP, _NAME_LINE = 0.42, 0.36, 0.1, 0.19
_NAME_CHARACTERS = 25  # longest line of a rule's name

# The colours of a pair differ in lightness, which is visible with any colour vision; the hues are Okabe and Ito's.
_BLUE, _LIGHT_BLUE = "#0072B2", "#A9D6F0"  # rules that use distances
_GREY, _LIGHT_GREY = "#6E6E6E", "#D0D0D0"  # rules that do not use distances
_VERMILION = "#D55E00"
_TEXT, _FAINT_TEXT = "#1A1A1A", "#595959"
_TITLE_SIZE, _LABEL_SIZE, _TICK_SIZE = 17, 12, 11


def draw(
    inspection: Inspection, path: str | os.PathLike[str], start: float = 0.0, seconds: float = DEFAULT_SECONDS
) -> None:
    """Write a PNG, 1600 pixels wide, that shows a part of the audio.

    The counts and ratios at the right are those of the whole audio, as in the table.

    Args:
        inspection: Result of ``fastcompress.inspection.table.inspect_audio``.
        path: File to write; an existing file is replaced.
        start: Start of the part that is shown, in seconds.
        seconds: Length of the part that is shown, cut at the end of the audio.

    Raises:
        ValueError: ``start`` is outside the audio, or ``seconds`` is not positive.
        OSError: The file cannot be written.
    """
    if not 0 <= start < inspection.seconds:
        raise ValueError(f"start must be from 0 to {inspection.seconds:.2f} s, the end of the audio, got {start:g} s")
    if not seconds > 0:
        raise ValueError(f"seconds must be more than 0, got {seconds:g}")
    stop = min(start + seconds, inspection.seconds)
    shown = [result for result in inspection.results if not result.on_noise]
    noise = {str(result.rule): result for result in inspection.results if result.on_noise}
    names = [_wrapped(str(result.rule)) for result in shown]
    row_heights = [max(_ROW, _NAME_LINE * (name.count("\n") + 1)) for name in names]
    height = _TITLE + _SPECTROGRAM + _GAP + _DISTANCE + _COUNT_HEADER + _AXIS
    height += sum(row_heights) + _ROW_GAP * len(row_heights)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    _write_title(figure, inspection, start, stop)
    top = _TITLE
    _draw_spectrogram(_add_axes(figure, top, _SPECTROGRAM), inspection, start, stop)
    top += _SPECTROGRAM + _GAP
    _draw_distance(_add_axes(figure, top, _DISTANCE), inspection, start, stop)
    top += _DISTANCE + _COUNT_HEADER
    caption = {"va": "center", "fontsize": _LABEL_SIZE, "color": _FAINT_TEXT}
    _write(figure, _LEFT, top - 0.16, "Each block is a segment: its frames become one token.", **caption)
    _write_counts(figure, top - 0.16, ("tokens", "ratio", "white noise" if noise else ""), _FAINT_TEXT)
    for result, name, row_height in zip(shown, names, row_heights, strict=True):
        axes = _add_axes(figure, top, row_height)
        _draw_segments(axes, result, inspection.frame_rate, start, stop)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=10, fontsize=_LABEL_SIZE, color=_TEXT)
        on_noise = noise.get(str(result.rule))
        cells = (f"{result.tokens}", _times(result.ratio), _times(on_noise.ratio) if on_noise else "")
        _write_counts(figure, top + row_height / 2, cells, _TEXT)
        last = result is shown[-1]
        axes.tick_params(labelbottom=last, bottom=last)
        if last:
            axes.set_xlabel("seconds", fontsize=_LABEL_SIZE)
        top += row_height + _ROW_GAP
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # file names in any script
        figure.savefig(os.fspath(path), format="png", dpi=_DPI)


def _add_axes(figure: Figure, top: float, height: float) -> Axes:
    width, total = figure.get_size_inches()
    axes = figure.add_axes((_LEFT / width, 1 - (top + height) / total, 1 - (_LEFT + _RIGHT) / width, height / total))
    axes.tick_params(labelsize=_TICK_SIZE, colors=_TEXT)
    return axes


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text at ``x`` inches from the left and ``y`` from the top, literally: file names can contain ``$``."""
    width, total = figure.get_size_inches()
    figure.text(x / width, 1 - y / total, text, parse_math=False, **style)


def _write_title(figure: Figure, inspection: Inspection, start: float, stop: float) -> None:
    name = os.path.basename(inspection.path).encode("utf-8", "backslashreplace").decode("utf-8")  # may have surrogates
    if len(name) > 90:
        name = f"{name[:60]} … {name[-25:]}"
    facts = (
        f"{inspection.seconds:.2f} s,  {inspection.source},  {len(inspection.frames)} frames at "
        f"{inspection.frame_rate:.4g} per second"
    )
    if start > 0 or stop < inspection.seconds:
        facts += f".  Shown: {start:g} to {stop:g} s; the counts cover the whole audio"
    facts = ".  ".join([facts, *(note.rstrip(".") for note in inspection.notes)])
    _write(figure, _LEFT, 0.42, name, fontsize=_TITLE_SIZE, fontweight="bold", color=_TEXT)
    _write(figure, _LEFT, 0.76, facts, fontsize=_LABEL_SIZE, color=_FAINT_TEXT)


def _write_counts(figure: Figure, y: float, cells: tuple[str, str, str], color: str) -> None:
    for offset, cell in zip((0.78, 1.6, 2.8), cells, strict=True):
        x = _WIDTH - _RIGHT + offset
        _write(figure, x, y, cell, ha="right", va="center", fontsize=_LABEL_SIZE, color=color)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def _draw_spectrogram(axes: Axes, inspection: Inspection, start: float, stop: float) -> None:
    first, last = _frame_range(FRAME_RATE, start, stop, len(inspection.spectrogram))
    part = inspection.spectrogram[first:last].T.numpy()  # [bands, frames]
    low, high = float(np.quantile(part, 0.05)), float(part.max())
    axes.imshow(
        part,
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        vmin=low,
        vmax=max(high, low + 1e-3),  # in silence all values are equal
        extent=(first / FRAME_RATE, last / FRAME_RATE, 0, part.shape[0]),
    )
    axes.set_xlim(start, stop)
    centres = mel_centres(part.shape[0]).numpy()
    kilohertz = (0.25, 0.5, 1, 2, 4)
    axes.set_yticks(np.interp([1000 * f for f in kilohertz], centres, np.arange(len(centres)) + 0.5))
    axes.set_yticklabels([f"{f:g}" for f in kilohertz])
    axes.set_ylabel("log-mel\nkHz", fontsize=_LABEL_SIZE)
    axes.tick_params(labelbottom=False)


def _draw_distance(axes: Axes, inspection: Inspection, start: float, stop: float) -> None:
    rate = inspection.frame_rate
    first, last = _frame_range(rate, start, stop, len(inspection.distance))
    # d[t] is the distance between the frames t and t + 1; draw it where frame t + 1 begins.
    seconds = (np.arange(first, last) + 1) / rate
    axes.plot(seconds, inspection.distance[first:last].numpy(), color=_BLUE, linewidth=1.1)
    peaks = inspection.peaks[(inspection.peaks > first) & (inspection.peaks <= last)]
    heights = inspection.distance[peaks - 1].numpy()
    label = "local maximum\n(boundary of local-max)"
    axes.plot(peaks.numpy() / rate, heights, "o", color=_VERMILION, markersize=4, label=label)
    axes.set_xlim(start, stop)
    finite = inspection.distance[first:last].nan_to_num(0)
    axes.set_ylim(0, 1.08 * max(float(finite.max()) if len(finite) else 0, 0.05))
    axes.set_ylabel("distance\n1 − cosine", fontsize=_LABEL_SIZE)
    axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_LIGHT_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    # Put the legend outside of the axes, where it cannot cover the curve.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=_LABEL_SIZE, handletextpad=0.2)


def _draw_segments(axes: Axes, result: RuleResult, frame_rate: float, start: float, stop: float) -> None:
    spans = result.segments.seconds(frame_rate).numpy()  # [M, 2]
    visible = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < stop))
    corners = [[(a, 0), (a, 1), (b, 1), (b, 0)] for a, b in spans[visible]]
    pair = (_BLUE, _LIGHT_BLUE) if result.rule.needs_distance else (_GREY, _LIGHT_GREY)
    # Colour by the segment's index in the whole audio, so that colours do not depend on the part that is shown.
    axes.add_collection(PolyCollection(corners, facecolors=[pair[i % 2] for i in visible], linewidths=0))
    axes.set_xlim(start, stop)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _frame_range(frame_rate: float, start: float, stop: float, count: int) -> tuple[int, int]:
    """Return the range of frames that overlap [start, stop] seconds, at least one frame."""
    first = min(int(start * frame_rate), count - 1)
    return first, max(first + 1, min(int(np.ceil(stop * frame_rate)), count))


def _wrapped(rule: str) -> str:
    """Break the text of a rule into lines of about `_NAME_CHARACTERS`, after commas or the colon."""
    lines = [""]
    for part in rule.replace(":", ":\n").replace(",", ",\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME_CHARACTERS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
