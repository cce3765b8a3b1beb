"""Measure how many boundaries the order of additions in the dot products changes.

``python -m experiments.boundary_stability`` compares several numbers of partial sums and several precisions with fp64
scores. It counts the local maxima of the distance that differ, the exact ties, and the sequences whose token count
differs. docs/numerics.md contains the table.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 1280
FRAMES = 1500  # per sequence
BATCH = 4  # sequences per batch
LANES = (16, 32, 64, 128)
PRECISIONS = {  # dtype of the tree over the partial sums, dtype of roots, quotient and 1 - cosine
    "fp32 tree, fp32 rest": (torch.float32, torch.float32),
    "fp32 tree, fp64 rest": (torch.float32, torch.float64),
    "fp64 tree, fp64 rest": (torch.float64, torch.float64),
}


def _recursion(noise: Tensor, memory: Tensor) -> Tensor:
    for t in range(1, len(noise)):
        noise[t] += memory[t] * noise[t - 1]
    return noise


def features(kind: str, seed: int) -> Tensor:
    """Return features ``[BATCH * FRAMES, WIDTH]`` in fp32.

    ``speech`` changes abruptly, like phones; ``walk`` varies slowly; ``outliers`` is a slow walk of low rank with four
    channels that are far larger than the others, as in large encoders."""
    g = torch.Generator().manual_seed(seed)
    frames = BATCH * FRAMES
    if kind == "speech":
        memory = torch.where(torch.rand(frames, generator=g) < 0.15, 0.1, 0.8)
        latent = torch.randn(frames, 48, generator=g) * (1 - memory.square()).sqrt()[:, None]
        mixed = _recursion(latent, memory) @ torch.randn(48, WIDTH, generator=g) / math.sqrt(48)
        return mixed + 0.15 * torch.randn(frames, WIDTH, generator=g)
    rank = 48 if kind == "outliers" else WIDTH
    noise = torch.randn(frames + 8, rank, generator=g).cumsum(0)
    x = _recursion((noise[8:] - noise[:-8]) * 3 / 8, torch.full((frames,), 0.97))
    if kind == "outliers":
        x = x @ torch.randn(rank, WIDTH, generator=g) / math.sqrt(rank)
    x = F.layer_norm(x, (WIDTH,))
    if kind == "outliers":
        x[:, :4] = x[:, :4] * 0.05 + torch.tensor([60.0, -40.0, 25.0, -25.0])
    return x + 0.01 * torch.randn(frames, WIDTH, generator=g)


def partial_sums(a: Tensor, b: Tensor, lanes: int) -> Tensor:
    sums = torch.zeros(a.shape[0], lanes)
    for k in range(0, WIDTH, lanes):
        sums = sums + a[:, k : k + lanes] * b[:, k : k + lanes]
    return sums


def tree(sums: Tensor) -> Tensor:
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def distance(dot: Tensor, square: Tensor) -> Tensor:
    return 1 - dot / (square[:-1].sqrt() * square[1:].sqrt())


def peaks(d: Tensor) -> Tensor:
    """Return strict local maxima inside each sequence, ``[BATCH, FRAMES - 3]`` bool."""
    d = F.pad(d, (0, 1)).view(BATCH, FRAMES)[:, :-1]
    return (d[:, 1:-1] > d[:, :-2]) & (d[:, 1:-1] > d[:, 2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10, help=f"batches of {BATCH} sequences of {FRAMES} frames")
    batches = parser.parse_args().batches
    frames, sequences = batches * BATCH * FRAMES, batches * BATCH
    print(f"{frames} frames of {WIDTH}, {sequences} sequences; differences from fp64 scores")
    print(
        f"{'features':9} {'dtype':9} {'L':>4}  {'precision':21} {'moved/million':>15} {'ties':>5} {'other count':>12}"
    )
    for kind in ("speech", "walk", "outliers"):
        for dtype in (torch.float32, torch.bfloat16):
            counts: dict[tuple[int, str], list[int]] = {}
            for seed in range(batches):
                x = features(kind, seed).to(dtype)
                single, double = x.float(), x.double()
                exact = peaks(distance((double[:-1] * double[1:]).sum(1), double.square().sum(1)))
                for lanes in LANES:
                    dots, squares = partial_sums(single[:-1], single[1:], lanes), partial_sums(single, single, lanes)
                    for name, (tree_dtype, rest_dtype) in PRECISIONS.items():
                        dot, square = (tree(sums.to(tree_dtype)).to(rest_dtype) for sums in (dots, squares))
                        d = distance(dot, square).float()
                        found = peaks(d)
                        count = counts.setdefault((lanes, name), [0, 0, 0])
                        count[0] += int((found != exact).sum())
                        count[1] += int((d[1:] == d[:-1]).sum())
                        count[2] += int((found.sum(1) != exact.sum(1)).sum())
            for (lanes, name), (moved, ties, other) in counts.items():
                print(
                    f"{kind:9} {str(dtype)[6:]:9} {lanes:>4}  {name:21} {moved / frames * 1e6:>15.0f} {ties:>5} "
                    f"{other:>5} of {sequences}"
                )


if __name__ == "__main__":
    main()
