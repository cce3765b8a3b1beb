"""What the kernels share: launching, tile sizes, sequences, row groups, the look-back over tiles."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcompress.checks import check_layout_values

#: Words of the state that the programs of a launch share, before a word for each tile.
ERROR = tl.constexpr(0)  # 1: cu_seqlens or lengths are wrong
TOTAL = tl.constexpr(1)  # 1 + the number of segments; 0 as long as it is not known
NEXT_TILE = tl.constexpr(2)  # tiles are numbered in the order in which programs start
TILES = tl.constexpr(3)

#: What the word of a tile says in its lowest two bits; above them is a number of segments. 0: nothing yet.
OWN_COUNT = tl.constexpr(1)  # of the tile alone
COUNT_SO_FAR = tl.constexpr(2)  # of the tile and all before it

#: Arguments that differ from batch to batch. Triton would compile a kernel for each of 1, multiples of 16 and others, a
#: second each time, for nothing: wide loads hang on widths and strides alone.
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

#: Words that the preparing kernel clears a program.
CLEARED = tl.constexpr(1024)


def compile_options(num_warps: int, registers: int, nvidia: bool) -> dict[str, Any]:
    """Multiplication and addition are never fused: see docs/numerics.md.

    Of the 65,536 registers of an NVIDIA multiprocessor, 168 a thread let three programs of 4 warps run at once, 128 two
    of 8; without a bound the assembler aims at four and spills a few (Triton 3.7, sm_80 to sm_120). ``registers``, if
    not 0, is another bound.
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
    """Runs a kernel on the device of ``like``; ``args`` and ``constants`` are the kernel's own."""
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](*args, **constants, **compile_options(num_warps, registers, torch.version.cuda is not None))


def accumulate(dtype: torch.dtype) -> Any:
    """Triton's name of the accumulation dtype: fp64 for fp64, fp32 for every other floating type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def warps(dtype: torch.dtype, tiles: int = 1) -> int:
    """4 for each tile of 2048 elements, 16 a thread; 8 in fp64, so that as many registers hold it."""
    return tiles * (8 if dtype == torch.float64 else 4)


def column_block(width: int, dtype: torch.dtype, largest: int) -> int:
    """Columns a step: a power of two, 512 bytes of a row (a warp of 16-byte loads) but no more than the row has."""
    power: int = triton.next_power_of_2(width)
    return max(16, min(power, 512 // dtype.itemsize, largest))


def as_rows(x: Tensor) -> Tensor:
    """``[..., D]`` -> ``[N, D]`` whose columns are consecutive in memory; a copy only where strides demand it."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


@overload
def flat(tensor: Tensor) -> Tensor: ...


@overload
def flat(tensor: Tensor | None) -> Tensor | None: ...


def flat(tensor: Tensor | None) -> Tensor | None:
    """``[N]`` consecutive values."""
    return None if tensor is None else tensor.reshape(-1).contiguous()


def checks_at_once() -> bool:
    """Whether values on the device are to be checked before an op runs, which synchronizes."""
    return os.environ.get("FASTCOMPRESS_CHECK") == "1"


def double_bits(value: float) -> int:
    """The bits of a double as an integer: Triton would pass the number itself in fp32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


@dataclass
class Sequences:
    """First and end row of each sequence ``[B]`` int64 on the device, checked and in order, and the shared state.

    ``state`` holds ``TILES`` words and one for each tile, int64. ``steps`` are those of a search among B + 1 places.
    """

    begin: Tensor
    end: Tensor
    state: Tensor
    count: int
    rows: int
    explain: Callable[[], None]

    @property
    def steps(self) -> int:
        return self.count.bit_length()

    def read_total(self) -> int:
        """The number of segments, once they are found: the only read from the device, the error comes with it."""
        error: int
        total: int
        error, total = self.state[: TILES.value - 1].tolist()
        if error:
            self.explain()
            raise RuntimeError("fastcompress: cu_seqlens or lengths were wrong when the kernel read them")
        return total - 1


def prepare_sequences(
    rows: Tensor, dim: int, cu_seqlens: Tensor | None, lengths: Tensor | None, num_tiles: int = 0
) -> Sequences:
    """One launch: checks the batch, writes where its sequences lie, clears the state of ``num_tiles`` tiles.

    Args:
        rows: a tensor whose first dimensions are ``[N]`` (packed, ``dim`` 1) or ``[B, T]`` (padded, ``dim`` 2).
        cu_seqlens, lengths: int32 or int64. If their values are wrong, the error is noted in the state and the batch
            is one sequence of all rows, the others empty: nothing out of bounds is ever read.
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

    if checks_at_once():
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
    """Program 0 checks and writes the sequences, the others clear the words of the tiles."""
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
            # What a wrong batch becomes, and what a packed batch without cu_seqlens is.
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
    """Index of the first of ``count`` values in order that is greater than each ``value`` (int64), else ``count``."""
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
    """Where rows lie, [ROWS] each: whether a row is in a sequence and not dropped by its group; whether it starts a run
    or is in none; its sequence's first and end row; its group."""
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
    """Segments before ``tile``, whose own ``count`` is published meanwhile (Merrill and Garland, "Single-pass parallel
    prefix scan with decoupled look-back", 2016). All scalars int64.

    A word carries both the number and what it counts, and nothing else passes between tiles, so relaxed atomics are
    enough: an acquire would empty the first-level cache of the rows that are about to be read again. They are atomics
    and not volatile loads because every thread then gets one answer, also where several hold copies of a value.
    """
    before = count * 0
    if tile > 0:
        tl.atomic_xchg(STATE + TILES + tile, (count << 2) | OWN_COUNT, sem="relaxed")
        i = tl.arange(0, WORDS)  # [WORDS], 0 the nearest tile
        nearest = tile - 1
        last = tl.full((), WORDS, tl.int32)  # the nearest that knows all before it
        while last == WORDS:
            at = nearest - i
            words = tl.atomic_add(STATE + TILES + at, 0, mask=at >= 0, sem="relaxed")
            words = tl.where(at >= 0, words, COUNT_SO_FAR)
            known = (words & 3) != 0
            so_far = (words & 3) == COUNT_SO_FAR
            found = tl.min(tl.where(so_far, i, WORDS), 0)
            if tl.max(tl.where(known | (i > found), 0, 1), 0) == 0:  # all that are needed: else ask again
                before += tl.sum(tl.where(i <= found, words >> 2, 0), 0)
                nearest -= WORDS
                last = found
    tl.atomic_xchg(STATE + TILES + tile, ((before + count) << 2) | COUNT_SO_FAR, sem="relaxed")
    return before
