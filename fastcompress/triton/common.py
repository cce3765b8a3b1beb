"""Shared parts of the kernels: launches, tile sizes, sequences, row groups, and the look-back over tiles."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.checks import check_layout_values, checks_at_once

#: Indices of the words of the shared state of a launch. From ``TILES`` on, there is one word per tile.
ERROR = tl.constexpr(0)  # 1 if cu_seqlens or lengths are invalid
TOTAL = tl.constexpr(1)  # 1 + the number of segments; 0 until it is known
NEXT_TILE = tl.constexpr(2)  # counter that numbers tiles in the order in which programs start
TILES = tl.constexpr(3)

#: Kind of the number of segments in the word of a tile, in its lowest two bits; 0 means that there is no number yet.
OWN_COUNT = tl.constexpr(1)  # number of this tile
COUNT_SO_FAR = tl.constexpr(2)  # number of this tile and all earlier tiles

#: Arguments that differ from batch to batch and must not be specialized. Triton would compile separate kernels for 1,
#: for multiples of 16 and for other values, about 1 s each, without a benefit: vectorized loads depend on widths and
#: strides.
BATCH_SIZES = [
    "num_rows",
    "num_sequences",
    "steps",
    "padded_length",
    "num_segments",
    "num_tiles",
    "bound",
    "count",
    "num_texts",
    "num_audio_rows",
]

#: Words of the state that one program of ``prepare_sequences_kernel`` clears.
CLEARED = tl.constexpr(1024)


def compile_options(num_warps: int, registers: int, nvidia: bool) -> dict[str, Any]:
    """Return the compile options of a kernel. Multiplication and addition are never fused; see docs/numerics.md.

    On NVIDIA GPUs, registers per thread are limited to 168 with 4 warps, so that three programs fit on a
    multiprocessor, and to 128 with 8 warps, so that two fit. Without a limit the assembler aims at four programs and
    spills (Triton 3.7, sm_80 to sm_120). A ``registers`` other than 0 replaces the limit.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    return {**options, "maxnreg": registers or (168 if num_warps <= 4 else 128)} if nvidia else options


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    like: Tensor,
    *args: Any,
    num_warps: int = 4,
    registers: int = 0,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of ``like``; ``args`` and ``constants`` are passed to the kernel."""
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](*args, **constants, **compile_options(num_warps, registers, torch.version.cuda is not None))


def accumulate(dtype: torch.dtype) -> Any:
    """Return the accumulation dtype of Triton: fp64 for fp64, fp32 for every other floating dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def warps(dtype: torch.dtype, tiles: int = 1) -> int:
    """Return the number of warps for tiles of 2048 elements: 4 per tile, or 16 elements per thread; 8 in fp64."""
    return tiles * (8 if dtype == torch.float64 else 4)


def column_block(width: int, dtype: torch.dtype, largest: int) -> int:
    """Return the columns per step, a power of two: 512 bytes (16 per thread of a warp), or the width if smaller."""
    power: int = triton.next_power_of_2(width)
    return max(16, min(power, 512 // dtype.itemsize, largest))


def as_rows(x: Tensor) -> Tensor:
    """Return ``[..., D]`` as ``[N, D]`` with contiguous columns; copies only if the strides require it."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


@overload
def flat(tensor: Tensor) -> Tensor: ...


@overload
def flat(tensor: Tensor | None) -> Tensor | None: ...


def flat(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor as ``[N]``, contiguous."""
    return None if tensor is None else tensor.reshape(-1).contiguous()


def double_bits(value: float) -> int:
    """Return the bits of a double as an integer; Triton passes floating-point arguments as fp32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


@dataclass
class Sequences:
    """Checked sequences of a batch, and the shared state of the launches that use them.

    Attributes:
        begin: First row of each sequence, ``[B]`` int64 on the device, in order.
        end: End row of each sequence, ``[B]`` int64 on the device, in order.
        state: ``TILES`` words followed by one word per tile, int64 on the device.
        count: Number of sequences.
        rows: Number of rows.
        explain: Function that raises an error for invalid ``cu_seqlens`` or ``lengths``.
    """

    begin: Tensor
    end: Tensor
    state: Tensor
    count: int
    rows: int
    explain: Callable[[], None]

    @property
    def steps(self) -> int:
        """Number of steps of a binary search among the sequences."""
        return self.count.bit_length()

    def read_total(self) -> int:
        """Read the number of segments and the error flag: the only read from the device. Raise if the flag is set."""
        error: int
        total: int
        error, total = self.state[: TILES.value - 1].tolist()
        if error:
            self.explain()
            raise RuntimeError(
                "fastcompress: cu_seqlens or lengths were invalid when the kernel read them, and were changed since"
            )
        return total - 1


def prepare_sequences(
    rows: Tensor, dim: int, cu_seqlens: Tensor | None, lengths: Tensor | None, num_tiles: int = 0
) -> Sequences:
    """Check the layout of a batch, write its sequences, and clear the state of ``num_tiles`` tiles, in one launch.

    If the values of ``cu_seqlens`` or ``lengths`` are invalid, the kernel sets the error flag in the state. The first
    sequence then has all rows and the others are empty, so nothing out of bounds is read.

    Args:
        rows: A tensor whose leading dimensions are ``[N]`` (packed) or ``[B, T]`` (padded).
        dim: Number of leading dimensions, 1 or 2.
        cu_seqlens: ``[B + 1]`` int32 or int64, or ``None``.
        lengths: ``[B]`` int32 or int64, or ``None``.
        num_tiles: Number of tiles of the launch that will use the state.
    """
    shape = rows.shape[:dim]
    padded_length = shape[1] if dim == 2 else 0
    values = flat(lengths if dim == 2 else cu_seqlens)
    if dim == 2:
        count = shape[0]
    else:
        count = 1 if values is None else values.shape[0] - 1

    def explain() -> None:
        check_layout_values(shape, cu_seqlens, lengths)

    if checks_at_once(rows):
        explain()
    begin, end = (torch.empty(count, dtype=torch.int64, device=rows.device) for _ in range(2))
    state = torch.empty(TILES.value + num_tiles, dtype=torch.int64, device=rows.device)
    sequences = Sequences(begin, end, state, count, shape.numel(), explain)
    grid = (1 + triton.cdiv(num_tiles, CLEARED.value),)
    launch(
        prepare_sequences_kernel, grid, rows,
        values, begin, end, state, count, padded_length, sequences.rows, num_tiles, PADDED=dim == 2,
        BLOCK=128 if count <= 128 else 1024,
    )  # fmt: skip
    return sequences


@triton.jit(do_not_specialize=BATCH_SIZES)
def prepare_sequences_kernel(
    VALUES,
    BEGIN,
    END,
    STATE,
    num_sequences,
    padded_length,
    num_rows,
    num_tiles,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 checks and writes the sequences; the other programs clear the words of the tiles."""
    program = tl.program_id(0)
    if program == 0:
        wrong = tl.full((), 0, tl.int32)
        if VALUES is not None:
            for first in range(0, num_sequences, BLOCK):
                b = first + tl.arange(0, BLOCK)  # [BLOCK]
                inside = b < num_sequences
                value = tl.load(VALUES + b, mask=inside, other=0).to(tl.int64)
                if PADDED:
                    bad = (value < 0) | (value > padded_length)
                else:
                    following = tl.load(VALUES + b + 1, mask=inside, other=0).to(tl.int64)
                    bad = (value > following) | ((b == 0) & (value != 0))
                    bad = bad | ((b == num_sequences - 1) & (following != num_rows))
                wrong = wrong | tl.max((bad & inside).to(tl.int32), 0)
            if not PADDED:
                if num_sequences == 0:
                    only = tl.load(VALUES).to(tl.int64)
                    wrong = wrong | ((only != 0) | (num_rows != 0)).to(tl.int32)
        for first in range(0, num_sequences, BLOCK):
            b = first + tl.arange(0, BLOCK)  # [BLOCK]
            inside = b < num_sequences
            # The first sequence has all rows: for an invalid batch, and for a packed batch without cu_seqlens.
            begin = tl.where(b == 0, 0, num_rows).to(tl.int64)
            end = tl.zeros((BLOCK,), tl.int64) + num_rows
            if PADDED:
                padded_begin = b.to(tl.int64) * padded_length
                size = tl.zeros((BLOCK,), tl.int64) + padded_length
                if VALUES is not None:
                    size = tl.load(VALUES + b, mask=inside, other=0).to(tl.int64)
                begin = tl.where(wrong != 0, begin, padded_begin)
                end = tl.where(wrong != 0, end, padded_begin + size)
            elif VALUES is not None:
                begin = tl.where(wrong != 0, begin, tl.load(VALUES + b, mask=inside, other=0).to(tl.int64))
                end = tl.where(wrong != 0, end, tl.load(VALUES + b + 1, mask=inside, other=0).to(tl.int64))
            tl.store(BEGIN + b, begin, mask=inside)
            tl.store(END + b, end, mask=inside)
        tl.store(STATE + ERROR, wrong.to(tl.int64))
        tl.store(STATE + TOTAL, 0)
        tl.store(STATE + NEXT_TILE, 0)
    else:
        i = (program - 1).to(tl.int64) * CLEARED + tl.arange(0, CLEARED)  # [CLEARED]
        tl.store(STATE + TILES + i, tl.zeros((CLEARED,), tl.int64), mask=i < num_tiles)


@triton.jit
def upper_bound(VALUES, count, value, steps):
    """Return, for each ``value``, the index of the first of ``count`` sorted values that is greater, else ``count``."""
    low = value * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) >> 1
        open_ = low < high
        right = open_ & (tl.load(VALUES + middle, mask=open_, other=0) <= value)
        high = tl.where(open_ & (right == 0), middle, high)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit
def place_rows(row, BEGIN, END, num_sequences, steps, ROW_GROUP, HAS_ROW_GROUP: tl.constexpr):
    """Locate rows in their sequences and row groups.

    Returns, [ROWS] each: whether a row is in a sequence and not dropped by its row group; whether it starts a run or is
    in no run; the first and the end row of its sequence; and its row group.
    """
    b = upper_bound(END, num_sequences, row, steps)
    inside = (row >= 0) & (b < num_sequences)
    begin = tl.load(BEGIN + b, mask=inside, other=0)
    end = tl.load(END + b, mask=inside, other=0)
    inside = inside & (row >= begin)
    alive = inside
    changes = (inside == 0) | (row == begin)
    group = tl.where(inside, 1, -1)
    if HAS_ROW_GROUP:
        group = tl.load(ROW_GROUP + row, mask=inside, other=-1)
        previous = tl.load(ROW_GROUP + row - 1, mask=inside & (row > begin), other=-1)
        alive = inside & (group >= 0)
        changes = changes | (group <= 0) | (group != previous)
    return alive, changes, begin, end, group


@triton.jit
def look_back(STATE, tile, count, WORDS: tl.constexpr):
    """Publish the number of segments of a tile and return the number of segments before it. All scalars are int64.

    This is the decoupled look-back of Merrill and Garland ("Single-pass parallel prefix scan with decoupled look-back",
    2016). A word contains both a number and its kind, and tiles exchange nothing else, so relaxed atomics are
    sufficient; an acquire would invalidate the L1 cache, from which the rows are about to be read again. Atomics are
    used instead of volatile loads so that all threads get the same result, even if several have copies of a value.
    """
    before = count * 0
    if tile > 0:
        tl.atomic_xchg(STATE + TILES + tile, (count << 2) | OWN_COUNT, sem="relaxed")
        i = tl.arange(0, WORDS)  # [WORDS], 0 is the nearest tile
        nearest = tile - 1
        last = tl.full((), WORDS, tl.int32)  # the nearest tile with COUNT_SO_FAR
        while last == WORDS:
            at = nearest - i
            words = tl.atomic_add(STATE + TILES + at, 0, mask=at >= 0, sem="relaxed")
            words = tl.where(at >= 0, words, COUNT_SO_FAR)
            known = (words & 3) != 0
            so_far = (words & 3) == COUNT_SO_FAR
            found = tl.min(tl.where(so_far, i, WORDS), 0)
            if tl.max(tl.where(known | (i > found), 0, 1), 0) == 0:  # all needed words are known; else read again
                before += tl.sum(tl.where(i <= found, words >> 2, 0), 0)
                nearest -= WORDS
                last = found
    tl.atomic_xchg(STATE + TILES + tile, ((before + count) << 2) | COUNT_SO_FAR, sem="relaxed")
    return before
