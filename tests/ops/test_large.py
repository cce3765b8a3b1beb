"""Inputs of more than 2**31 elements on the CPU: many narrow rows, few wide ones, and both.

Zeros that are never written take no memory, so most of the input is zero. The few other rows come after element 2**31,
so that an offset of 32 bits would read or write in another place.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastcompress as fc
from fastcompress.dispatch.library import COMPILED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "config.getoption('--emulated') is not None or config.getoption('--device')", reason="of the CPU"
    ),
    pytest.mark.skipif(not COMPILED, reason="no compiled library: the reference would take hours"),
    pytest.mark.xdist_group("large"),
]

ELEMENTS = 2**31
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def plain_memory(poisoned_memory):
    """Turn off the filling of uninitialized tensors, so that memory that is not written takes no space."""
    torch.use_deterministic_algorithms(False)


def needs(gigabytes: float) -> None:
    meminfo = Path("/proc/meminfo")
    free = 0.0
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 2**20
    if free < gigabytes + 2:
        pytest.skip(f"needs {gigabytes + 2:g} GiB of memory, {free:.1f} are free")


def zeros(rows: int, width: int) -> torch.Tensor:
    assert rows * width > ELEMENTS
    return torch.zeros(rows, width, dtype=DTYPE)


def test_many_narrow_rows():
    needs(3)  # the distances
    rows, width = ELEMENTS // 8 + 5, 8
    x = zeros(rows, width)
    place = rows - 3
    x[place, 0] = 3.0
    pooled = fc.segment_pool(x, rule=fc.Threshold(0.5, min_len=1000))
    # This boundary is far from row 0, so that `min_len` does not suppress it.
    assert pooled.segments.starts.tolist() == [0, place] and pooled.segments.lengths.tolist() == [place, 3]
    assert pooled.values[:, 0].tolist() == [0, 1] and int(pooled.values.count_nonzero()) == 1
    assert pooled.cu_seqlens.tolist() == [0, 2]
    d = fc.adjacent_distance(x)
    assert d[place - 2 : place + 2].tolist()[:3] == [0, 1, 1] and d[:10].tolist() == [0] * 10
    assert int((d > 0).sum()) == 2
    del d
    uniform = fc.segment_pool(x, rule=fc.Uniform(place))
    assert uniform.values.equal(pooled.values)


def test_few_wide_rows():
    needs(5)
    width = ELEMENTS // 2 + 8
    x = zeros(3, width)
    x[1, -1], x[2, -1] = 2.0, 4.0
    assert fc.adjacent_distance(x).tolist()[:2] == [1.0, 0.0]
    segments = fc.segments_from_starts(torch.tensor([1]), 3)
    values = fc.segment_reduce(x, segments, "last")
    assert values[:, -1].tolist() == [0, 4] and int(values[1].count_nonzero()) == 1
    del values
    pooled = fc.segment_pool(x[1:], rule=fc.LocalMax())
    assert pooled.values[0, -1] == 3 and int(pooled.values.count_nonzero()) == 1


def test_rows_after_element_2_to_the_31_forward_and_backward():
    needs(6)  # the gradient
    rows, width = 2**20 + 40, 2048
    x = zeros(rows, width)
    begin = 2**20 + 8
    x[begin:, :4] = torch.arange(4.0)
    x[begin + 10 :, 7] = 9.0
    x.requires_grad_()
    cu = torch.tensor([0, begin, rows], dtype=torch.int32)
    pooled = fc.segment_pool(x, rule=fc.Threshold(0.2), cu_seqlens=cu)
    assert pooled.segments.starts.tolist() == [0, begin, begin + 10]
    assert pooled.values[2, :8].tolist() == [0, 1, 2, 3, 0, 0, 0, 9]
    weight = torch.zeros_like(pooled.values)
    weight[2] = 22
    (grad,) = torch.autograd.grad(pooled.values, x, weight)
    assert rows - begin - 10 == 22
    assert int(grad.count_nonzero()) == 22 * width and bool((grad[begin + 10 :] == 1).all())


def test_packing_more_than_2_to_the_31_elements():
    needs(6)
    rows, width = 2**20 + 3, 2048
    ids = torch.zeros(rows, dtype=torch.int64)
    ids[-2] = 1
    table = torch.zeros(2, width, dtype=DTYPE)
    table[1] = 7
    audio = torch.full((2, width), 3.0, dtype=DTYPE)
    group = torch.zeros(rows, dtype=torch.int32)
    group[-1] = 1
    packed = fc.pack(ids, table, audio, row_group=group)
    assert packed.inputs_embeds.shape == (rows + 1, width)
    assert packed.inputs_embeds[-3:, -1].tolist() == [7, 3, 3]
    assert int(packed.inputs_embeds.count_nonzero()) == 3 * width
    assert packed.source[-3:].tolist() == [rows - 2, rows, rows + 1]


def test_more_rows_than_int32_counts():
    """Ops on given segments (int64) support more rows; ops that count frames in int32 raise an error."""
    rows = 2**31 + 5
    x = torch.ones(1, 2, dtype=DTYPE).expand(rows, 2)
    starts, lengths = torch.tensor([3, rows - 4]), torch.tensor([2, 4])
    segments = fc.Segments(starts, lengths, torch.tensor([0, 2]).int(), torch.tensor([0, 0]).int(), rows)
    assert fc.segment_reduce(x, segments, "sum").tolist() == [[2, 2], [4, 4]]
    for call in (fc.segment_pool, lambda x: fc.select_boundaries(x[:, 0], "uniform:2")):
        with pytest.raises(ValueError, match="fewer than 2\\*\\*31 rows"):
            call(x)
