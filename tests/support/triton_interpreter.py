"""Helpers of the tests in ``tests/triton/interpreted``, which run with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from fastcompress.triton import OPS
from tests.support.sample_inputs import DTYPES, Batch, assert_same_bits, batches, padded
from tests.support.slow import some

FUSED = (
    fc.Uniform(1),
    fc.Uniform(3),
    fc.Uniform(3, tail="drop"),
    fc.Uniform(100),
    fc.Threshold(0.15),
    fc.LocalMax(),
    fc.LocalMax(order=2, threshold=0.3),
    fc.LocalMax(order=3),
    fc.LocalMax(order=16),
)
SHORT = (0, 1, 2, 3, 17, 5)
# Fewer dtypes in `make test`, since the interpreter is slow.
QUICK = some(DTYPES, torch.float32, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "max", "first", "last", "middle")


def convert_float(x, source, target, rounding, convert=interpreter._convert_float):
    """Convert between fp32 and bf16 with rounding, as hardware does; the interpreter truncates."""
    if source == tl.bfloat16 and target == tl.float32:
        return (x.view(np.uint16).astype(np.uint32) << 16).reshape(x.shape)
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(x).view(np.uint32)
        to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        is_nan = bits & 0x7FFFFFFF > 0x7F800000
        return np.where(is_nan, 0x7FC0, to_even).astype(np.uint16).reshape(x.shape)
    return convert(x, source, target, rounding)


def check(name: str, *args, what: str = "") -> None:
    """Assert that an op and its definition return the same bits."""
    actual, expected = OPS[name](*args), DEFINITION[name](*args)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (a, b) in reversed(list(enumerate(zip(actual, expected, strict=True)))):
        assert_same_bits(a, b, f"{what}: {name}, result {i}")


def layout(batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return cu_seqlens, lengths and row groups in the form that the ops take."""
    group = batch.layout.get("row_group")
    if "attention_mask" in batch.layout:
        group = torch.where(batch.layout["attention_mask"].bool(), 1, -1).int()
    return batch.layout.get("cu_seqlens"), batch.layout.get("lengths"), group


def layouts(width: int, dtype: torch.dtype, kind: str = "smooth") -> Iterator[Batch]:
    """Yield every layout of ``batches``, with fewer padded rows because the interpreter is slow."""
    for batch in batches(width, dtype, kind):
        yield padded(kind, width, dtype, SHORT) if batch.x.dim() == 3 and batch.x.shape[1] > 60 else batch


def given_segments() -> tuple[Tensor, Tensor, int]:
    """Return starts, lengths and rows of segments. Some are empty or longer than one or two blocks, with gaps."""
    lengths = torch.tensor([1, 2, 0, 3, 64, 65, 130, 5, 0, 20, 0])
    gaps = torch.tensor([0, 0, 0, 0, 3, 0, 0, 9, 0, 0, 4])
    starts = (lengths + gaps).cumsum(0) - lengths
    return starts, lengths, int(starts[-1]) + 2
