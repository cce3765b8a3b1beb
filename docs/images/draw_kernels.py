"""Draw docs/images/tiles.svg and look-back.svg: `python docs/images/draw_kernels.py [folder]`.

tiles.svg shows the segments that `segment_pool` finds in 32 rows, and the distances of these rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

import fastcompress as fc  # noqa: E402

ROWS, TILE, ORDER, EXTRA = 32, 8, 1, 2  # EXTRA: kExtraRows of csrc/cuda/params.h
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
GREY, PALE = "#555555", "#e6e6e6"
OWN, SO_FAR, NOTHING = "#ccbb44", "#228833", "#ffffff"


def walk(seed: int = 52) -> tuple[torch.Tensor, fc.Segments]:
    """Return distances and segments of rows that change slowly most of the time."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(ROWS, 16, generator=g) * torch.rand(ROWS, 1, generator=g) ** 2
    x = torch.randn(16, generator=g) + steps.cumsum(0)
    return fc.adjacent_distance(x), fc.segment_pool(x, rule=fc.LocalMax(order=ORDER)).segments


def cell(ax: Axes, x: float, y: float, colour: str, hatch: str | None = None) -> None:
    ax.add_patch(Rectangle((x, y), 1, 0.8, facecolor=colour, edgecolor="white", hatch=hatch, lw=0.8))


def draw_tiles(path: Path) -> None:
    d, segments = walk()
    starts = segments.starts.tolist()
    ids = segments.ids().tolist()
    fig, ax = plt.subplots(figsize=(11, 5.2))
    top = d[:-1].max().item()
    for t in range(ROWS - 1):
        peak = t + 1 in starts
        height = 1.6 * d[t].item() / top
        ax.add_patch(Rectangle((t + 0.82, 6.3), 0.36, height, facecolor="#222222" if peak else "#bbbbbb"))
    ax.text(-0.5, 6.7, "distance between\nneighbours", ha="right", va="center")
    for row, m in enumerate(ids):
        cell(ax, row, 5.2, COLOURS[m % len(COLOURS)])
    for start in starts:
        ax.plot([start, start], [5.1, 6.25], color="#222222", lw=1.2)
    ax.text(-0.5, 5.6, "rows, by segment", ha="right", va="center")
    for tile in range(ROWS // TILE):
        y = 3.8 - 1.15 * tile
        begin, end = tile * TILE, (tile + 1) * TILE
        first, last = max(0, begin - 1 - ORDER), min(ROWS, end + ORDER + EXTRA)
        for row in range(first, last):
            inside = begin <= row < end
            owner = starts[ids[row]]  # first row of the segment
            summed = begin <= owner < end
            cell(ax, row, y, COLOURS[ids[row] % len(COLOURS)] if summed else PALE, None if summed else "///")
            if inside:
                ax.plot([row, row + 1], [y - 0.06, y - 0.06], color=GREY, lw=2, solid_capstyle="butt")
        count = sum(begin <= s < end for s in starts)
        ax.text(-0.5, y + 0.4, f"block of tile {tile}", ha="right", va="center")
        ax.text(ROWS + 0.5, y + 0.4, f"publishes {count}", ha="left", va="center")
        final = [m for m, s in enumerate(starts) if begin <= s < end][-1:]
        stop = starts[final[0]] + int(segments.lengths[final[0]]) if final else end
        if stop > last:  # the segment is longer than the window: the block reads further rows
            arrow(ax, (last, y + 0.4), (stop, y + 0.4))
            ax.text(stop + 0.2, y + 0.4, "reads on", va="center", fontsize=9.5, color=GREY)
    averaged = "in colour: rows that the block averages; their segments start in its tile (underlined)"
    scored = f"{1 + ORDER} before and {ORDER} after decide boundaries, {EXTRA} more serve the last segment"
    ax.text(0, -1.0, averaged, va="center", fontsize=9.5, color=GREY)
    ax.text(0, -1.6, f"hatched: rows that the block only scores; {scored}", va="center", fontsize=9.5, color=GREY)
    finish(fig, ax, (-6.5, ROWS + 4.5), (-2.0, 8.2), path)


def draw_look_back(path: Path) -> None:
    counts = [3, 2, 4, 1, 3, 2]
    so_far = [sum(counts[: i + 1]) for i in range(len(counts))]
    moments = [  # what each tile has published: 0 nothing, 1 its own count, 2 the count so far
        ("tile 0 has no tile before it", [2, 0, 0, 0, 0, 0]),
        ("tiles 1, 3 and 4 have scored", [2, 1, 0, 1, 1, 0]),
        ("tile 1 looked back at tile 0", [2, 2, 0, 1, 1, 0]),
        ("tiles 2 and 5 have scored; tile 5 looks back:\ncounts 3, 1 and 4, then total 5", [2, 2, 1, 1, 1, 1]),
        ("tile 5 writes its segments from index 13", [2, 2, 1, 1, 1, 2]),
    ]
    fig, ax = plt.subplots(figsize=(11, 4.6))
    for tile in range(len(counts)):
        ax.text(2 * tile + 0.9, 6.15, f"tile {tile}", ha="center", va="bottom")
    for step, (text, state) in enumerate(moments):
        y = 5.2 - 1.3 * step
        for tile, kind in enumerate(state):
            shown = ("", str(counts[tile]), str(so_far[tile]))[kind]
            colour = (NOTHING, OWN, SO_FAR)[kind]
            ax.add_patch(Rectangle((2 * tile, y), 1.8, 0.8, facecolor=colour, edgecolor=GREY, lw=0.8))
            ax.text(2 * tile + 0.9, y + 0.4, shown, ha="center", va="center", color="white" if kind == 2 else "black")
        if step == 3:
            for tile in range(4, 0, -1):
                arrow(ax, (2 * tile + 2.4, y + 0.86), (2 * tile + 0.9, y + 0.86), connectionstyle="arc3,rad=0.35")
        ax.text(12.2, y + 0.4, text, va="center")
    ax.text(-0.4, 3.0, "time", rotation=90, ha="right", va="center", color=GREY)
    arrow(ax, (-0.25, 5.9), (-0.25, 0.0))
    legend = ((0, NOTHING, "nothing yet"), (3.2, OWN, "segments in this tile"), (7.6, SO_FAR, "total up to this tile"))
    for x, colour, text in legend:
        ax.add_patch(Rectangle((x, -1.2), 0.6, 0.5, facecolor=colour, edgecolor=GREY, lw=0.8))
        ax.text(x + 0.8, -0.95, text, va="center", fontsize=9.5, color=GREY)
    finish(fig, ax, (-1.0, 21), (-1.5, 6.8), path)


def arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float], **kwargs: str) -> None:
    ax.add_patch(FancyArrowPatch(begin, end, arrowstyle="->", mutation_scale=12, color=GREY, **kwargs))


def finish(fig: plt.Figure, ax: Axes, x: tuple[float, float], y: tuple[float, float], path: Path) -> None:
    ax.set_xlim(*x)
    ax.set_ylim(*y)
    ax.axis("off")
    metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture is the same file
    fig.savefig(path, bbox_inches="tight", facecolor="white", metadata=metadata)
    plt.close(fig)


def main(folder: str = str(Path(__file__).parent), suffix: str = "svg") -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "fastcompress", "font.size": 10.5, "hatch.color": "#aaaaaa"})
    draw_tiles(Path(folder) / f"tiles.{suffix}")
    draw_look_back(Path(folder) / f"look-back.{suffix}")


if __name__ == "__main__":
    main(*sys.argv[1:])
