"""Inputs that tests of correctness, gradients and operators share, and the comparison of bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastcompress as fc

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDTHS = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 257)
WIDE = (1280, 4096)  # Whisper large; the hidden size of an 8B language model
FEATURES = ("iid", "smooth", "repeated", "zeros", "nonfinite", "huge", "tiny")
#: Kernels treat three parts of a row separately: strips of units, units of 32 elements, and a tail. The widths cover
#: them. The features cover special values at one width, 33, which has a unit and a tail.
WIDTHS_AND_FEATURES = (*((width, "iid") for width in WIDTHS), *((33, kind) for kind in FEATURES if kind != "iid"))
RAGGED = (0, 1, 2, 3, 40, 0, 17, 65, 5)  # frames of the sequences of a batch
#: Offsets that are not those of 60 rows.
BAD_OFFSETS = (
    [0, 50, 20, 60],
    [5, 60],
    [0, 40],
    [0, 2**31 - 1],
    [-7, 60],
    [0, 70, 60],
    [60],
    [0, -5, 60],
    [0, 60, 60, 61],
)

RULES = (
    fc.Uniform(1),
    fc.Uniform(3),
    fc.Uniform(3, tail="drop"),
    fc.Uniform(100),
    fc.LocalMax(),
    fc.LocalMax(order=2),
    fc.LocalMax(order=50),
    fc.LocalMax(threshold=0.3),
    fc.LocalMax(prominence=0.1),
    fc.LocalMax(min_len=4),
    fc.LocalMax(max_len=2),
    fc.LocalMax(order=2, min_len=2, max_len=5),
    fc.Threshold(0.15),
    fc.Threshold(0.9, min_len=3, max_len=7),
)


#: Every rule in fp32, and one rule of each kind in the other dtypes, since rules read distances (fp32 or fp64).
FEW_RULES = (fc.Uniform(3), fc.LocalMax(), fc.Threshold(0.9, min_len=2, max_len=5))
DTYPES_AND_RULES = (
    *((torch.float32, rule) for rule in dict.fromkeys((*RULES, *FEW_RULES))),
    *((dtype, rule) for dtype in DTYPES[1:] for rule in FEW_RULES),
)


@dataclass
class Batch:
    """A batch in one of the layouts; ``layout`` contains the keyword arguments that describe it."""

    name: str
    x: Tensor
    layout: dict[str, Tensor]

    def __str__(self) -> str:
        return self.name

    def sequences(self) -> list[tuple[int, int]]:
        """Return the first row and the end of each sequence, as rows of ``x.reshape(-1, D)``."""
        if self.x.dim() == 3:
            size, padded = self.x.shape[:2]
            lengths = self.layout.get("lengths", torch.full((size,), padded)).tolist()
            return [(b * padded, b * padded + length) for b, length in enumerate(lengths)]
        ends = self.layout.get("cu_seqlens", torch.tensor([0, len(self.x)])).tolist()
        return [(ends[b], ends[b + 1]) for b in range(len(ends) - 1)]


def features(kind: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return deterministic features ``[rows, width]``."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    if kind == "smooth":
        x = x.cumsum(0) * 0.3 + 1
    elif kind == "repeated":
        x = x[torch.arange(rows) // 3]
    elif kind == "zeros":
        x[torch.rand(rows, generator=g) < 0.5] = 0
    elif kind == "nonfinite":
        bad = torch.rand(rows, generator=g)
        x[bad < 0.1] = torch.nan
        x[(bad >= 0.1) & (bad < 0.15), -1:] = torch.inf
    elif kind in ("huge", "tiny"):
        some = torch.rand(rows, generator=g) < 0.3
        x[some] *= 1e25 if kind == "huge" else 1e-25
    return x.to(dtype)


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    """Return the ``cu_seqlens`` of the lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(kind: str, width: int, dtype: torch.dtype, lengths: tuple[int, ...] = RAGGED) -> Batch:
    x = features(kind, sum(lengths), width, dtype)
    return Batch(f"packed-{kind}-{width}", x, {"cu_seqlens": offsets(lengths)})


def padded(kind: str, width: int, dtype: torch.dtype, lengths: tuple[int, ...] = RAGGED) -> Batch:
    """Return the frames of ``packed`` with NaN between the sequences, which no op may read."""
    rows = packed(kind, width, dtype, lengths).x
    x = torch.full((len(lengths), max(lengths, default=0) + 2, width), torch.nan, dtype=dtype)
    for row, part in zip(x, rows.split(lengths), strict=True):
        row[: len(part)] = part
    return Batch(f"padded-{kind}-{width}", x, {"lengths": torch.tensor(lengths, dtype=torch.int64)})


def row_groups(rows: int, seed: int = 0) -> Tensor:
    """Return row groups ``[rows]`` int32: runs of dropped, kept and pooled rows, some of adjacent audios."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (rows,), generator=g)
    values = torch.randint(-1, 4, (rows,), generator=g)
    return values.repeat_interleave(sizes)[:rows].int()


#: Number of rows of ``TOKENS``.
TOKEN_ROWS = 345
#: Starts and lengths of tokens of integrate-and-fire. They include shared rows, gaps, tokens of one row, rows in which
#: one, two or many tokens start (with and without the end of another), and lengths around blocks of 64.
TOKENS = (
    torch.tensor([0, 0, 0, 2, 3, 3, 3, 4, 9, 72, 72, 72, 72, 135, 199, 300, 340, 340]),
    torch.tensor([1, 1, 3, 2, 1, 1, 1, 5, 64, 1, 1, 1, 64, 65, 66, 2, 1, 5]),
)


def batches(width: int, dtype: torch.dtype, kind: str = "smooth") -> Iterator[Batch]:
    """Yield every layout: packed (also empty), padded, with a mask, with row groups."""
    yield packed(kind, width, dtype)
    yield Batch("one-sequence", packed(kind, width, dtype).x, {})
    yield Batch("no-sequence", torch.zeros(0, width, dtype=dtype), {"cu_seqlens": offsets(())})
    yield Batch("no-frame", torch.zeros(0, width, dtype=dtype), {"cu_seqlens": offsets((0, 0))})
    yield Batch("int64", packed(kind, width, dtype).x, {"cu_seqlens": offsets(RAGGED, torch.int64)})
    yield padded(kind, width, dtype)
    yield padded(kind, width, dtype, ())  # [0, 2, D]
    yield Batch("padded-no-frame", torch.zeros(2, 0, width, dtype=dtype), {"lengths": torch.tensor([0, 0])})
    full = features(kind, 3 * 20, width, dtype).view(3, 20, width)
    yield Batch("padded-full", full, {})
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :7] = mask[1, 12:] = mask[2, 5:9] = 0  # on the left, on the right, in the middle
    yield Batch("masked", full, {"attention_mask": mask})
    grouped = packed(kind, width, dtype)
    yield Batch("grouped", grouped.x, {**grouped.layout, "row_group": row_groups(len(grouped.x))})
    yield Batch("grouped-padded", full, {"row_group": row_groups(60).view(3, 20)})


def strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors equal to ``x`` in other memory layouts."""
    yield "row gap", torch.stack([x, x.new_full(x.shape, torch.nan)], dim=-2).flatten(-3, -2)[..., ::2, :]
    yield "column slice", torch.cat([x.new_full((*x.shape[:-1], 3), torch.nan), x], dim=-1)[..., 3:]
    yield "column step", torch.stack([x, x.new_full(x.shape, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "unaligned", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def expanded(rows: int, width: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors ``[rows, width]`` with strides of 0."""
    x = features("smooth", rows, width, dtype)
    yield "one row", x[:1].expand(rows, width)
    yield "one column", x[:, :1].expand(rows, width)
    yield "one value", x[:1, :1].expand(rows, width)


def bits(x: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, with one pattern for NaN. Integer tensors are returned unchanged."""
    if not x.is_floating_point():
        return x
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), torch.iinfo(integer).max, x.contiguous().view(integer))


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert equal dtype, shape and bits; -0 differs from 0, and NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} is not {list(expected.shape)}"
    different = (bits(actual) != bits(expected)).nonzero()
    if len(different):
        index = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} of {actual.numel()} values differ, first at {index}: "
            f"{actual[index].item()!r} is not {expected[index].item()!r}"
        )


def packing(seed: int, rows: int = 400, **changes: object) -> dict[str, object]:
    """Return arguments of pack_map: samples of a few tiles, with neighbouring audios of any size."""
    g = torch.Generator().manual_seed(seed)
    groups = row_groups(rows, seed)
    begins = torch.tensor([0, *sorted(torch.randint(0, rows, (3,), generator=g).tolist()), rows])
    starts = (groups > 0) & ((groups != groups.roll(1)) | torch.zeros(rows).bool().index_fill(0, begins[:-1], True))
    sizes = torch.randint(0, 40, (int(starts.sum()),), generator=g)
    cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    ids = torch.randint(0, 50, (rows,), generator=g)
    return {
        "row_group": groups,
        "ids": ids,
        "cu_seqlens": begins.int(),
        "lengths": None,
        "audio_cu_seqlens": cu,
        "num_embeddings": 50,
        "num_audio_rows": int(cu[-1]),
        "compact": True,
        **changes,
    }
