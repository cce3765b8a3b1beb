"""Invalid input, launches, fakes and memory.

Run by tests/triton/test_triton.py. By hand: ``TRITON_INTERPRET=1 pytest tests/triton/interpreted/contracts.py``.
"""

from __future__ import annotations

import pytest
import torch

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from fastcompress.rules import max_segments
from fastcompress.triton import OPS, common, tiles
from fastcompress.triton.segment_reduce import segment_grid, segment_tile
from tests.support.sample_inputs import (
    assert_same_bits,
    features,
    offsets,
    packed,
)
from tests.support.triton_interpreter import (
    FUSED,
    REDUCTIONS,
    given_segments,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, for infinities


HOSTILE = ([0, 99], [1, 40], [0, 30, 20, 40], [0, -5, 40], [0, 2**31 - 1, 40], [-(2**31), 40], [0, 39], [7])


@pytest.mark.parametrize("values", HOSTILE, ids=str)
def test_hostile_offsets(values: list[int]):
    """The error is raised where the count is read. Without a read, all rows are one sequence.

    No access is out of bounds in either case.
    """
    x = torch.full((140, 8), torch.nan)
    x[50:90] = features("iid", 40, 8, torch.float32)
    x, cu = x[50:90], torch.tensor(values, dtype=torch.int32)
    sequences = len(values) - 1
    # All rules read offsets in the same way.
    rules = (fc.LocalMax(), fc.Uniform(3), fc.Threshold(0.5, min_len=2)) if values == HOSTILE[2] else (fc.LocalMax(),)
    for rule in rules:
        args = rule.op_args()
        with pytest.raises(ValueError, match="cu_seqlens must"):
            OPS["segment_pool"](x, None, cu, None, None, *args, True)
        with pytest.raises(ValueError, match="cu_seqlens must"):
            OPS["select_boundaries"](x[:, 0].contiguous(), cu, None, None, *args, True)
        pooled = OPS["segment_pool"](x, None, cu, None, None, *args, False)
        name, size, _, _, min_len, max_len, _ = args
        assert len(pooled[0]) == max_segments(name, size, min_len, max_len, 40, sequences)
        if sequences:
            one = offsets((40,) + (0,) * (sequences - 1))
            expected = DEFINITION["segment_pool"](x, None, one, None, None, *args, False)
            for a, b in zip(pooled, expected, strict=True):
                assert_same_bits(a, b, str(rule))
    if sequences:
        assert_same_bits(OPS["greedy_boundaries"](x, cu, None, 0.9, 0), OPS["greedy_boundaries"](x, None, None, 0.9, 0))
        one = DEFINITION["adjacent_distance"](x, None, None, 1)
        assert_same_bits(OPS["adjacent_distance"](x, cu, None, 1), one)
    assert OPS["adjacent_distance_backward"](torch.ones(40), x, cu, None, 1).isfinite().all()


@pytest.mark.parametrize("values", [[-1, 3], [4, 21], [2**31 - 1, 0], [-(2**31), 20]], ids=str)
def test_hostile_lengths(values: list[int]):
    x, lengths = features("iid", 40, 8, torch.float32).view(2, 20, 8), torch.tensor(values, dtype=torch.int32)
    for rule in (fc.LocalMax(), fc.Uniform(3)):
        with pytest.raises(ValueError, match="lengths must lie in"):
            OPS["segment_pool"](x, None, None, lengths, None, *rule.op_args(), True)
        pooled = OPS["segment_pool"](x, None, None, lengths, None, *rule.op_args(), False)
        expected = DEFINITION["segment_pool"](x.view(40, 8), None, offsets((40, 0)), None, None, *rule.op_args(), False)
        for a, b in zip(pooled, expected, strict=True):
            assert_same_bits(a, b, str(rule))


def test_hostile_segments():
    x = torch.full((100, 8), torch.nan)
    x[40:60] = 1.0
    x = x[40:60]
    starts = torch.tensor([-7, 3, 2**62, 19, -(2**63), 0])
    lengths = torch.tensor([5, 2**62, 4, 9, -1, 20])
    for reduce in REDUCTIONS:
        assert (OPS["segment_reduce"](x, starts, lengths, reduce).isfinite()).all()
        if reduce != "max":
            OPS["segment_expand"](torch.ones(6, 8), starts, lengths, 20, reduce)
    weights = torch.ones(20)
    OPS["segment_weighted_mean_backward"](torch.ones(6, 8), x, torch.ones(6, 8), weights, starts, lengths)
    OPS["segment_max_backward"](torch.ones(6, 8), x, torch.ones(6, 8), starts, lengths)
    assert OPS["integrate_rows"](x, weights, torch.ones(6), None, starts, lengths).isfinite().all()
    for found in OPS["integrate_rows_backward"](torch.ones(6, 8), x, weights, torch.ones(6), starts, lengths):
        assert found.isfinite().all()


def test_values_are_checked_at_once_if_asked(monkeypatch):
    monkeypatch.setenv("FASTCOMPRESS_CHECK", "1")
    x, cu = torch.ones(20, 8), torch.tensor([0, 30])
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        OPS["adjacent_distance"](x, cu, None, 1)
    with pytest.raises(ValueError, match="must lie inside"):
        OPS["segment_reduce"](x, torch.tensor([0]), torch.tensor([21]), "mean")
    with pytest.raises(ValueError, match="must lie inside"):
        OPS["integrate_rows"](x, torch.ones(20), torch.ones(1), None, torch.tensor([0]), torch.tensor([21]))


def test_launches(monkeypatch):
    """An op launches a fixed number of kernels, and reads nothing from the device without ``compact``."""
    names = []
    options = common.compile_options
    monkeypatch.setattr(common, "compile_options", lambda *args: names.append(1) or options(*args))
    monkeypatch.setattr(common.Sequences, "read_total", lambda self: pytest.fail("reads from the device"))
    batch = packed("iid", 8, torch.float32)
    cu = batch.layout["cu_seqlens"]

    def launches(name: str, *args) -> int:
        names.clear()
        OPS[name](*args)
        return len(names)

    for rule in FUSED:
        assert launches("segment_pool", batch.x, None, cu, None, None, *rule.op_args(), False) == 2, rule
    for rule, more in ((fc.LocalMax(order=17), 0), (fc.LocalMax(prominence=0.1), 0), (fc.Threshold(0.1, min_len=2), 1)):
        assert launches("segment_pool", batch.x, None, cu, None, None, *rule.op_args(), False) == 5 + more, rule
        d = batch.x[:, 0].contiguous()
        assert launches("select_boundaries", d, cu, None, None, *rule.op_args(), False) == 3 + more, rule
    assert launches("adjacent_distance", batch.x, cu, None, 1) == 2
    assert launches("greedy_boundaries", batch.x, cu, None, 0.3, 0) == 3
    starts, lengths, rows = given_segments()
    assert launches("segment_reduce", features("iid", rows, 8, torch.float32), starts, lengths, "mean") == 1
    assert launches("segment_expand", torch.ones(len(starts), 8), starts, lengths, rows, "mean") == 1


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rule", [fc.LocalMax(), fc.LocalMax(min_len=2), fc.Uniform(1)], ids=str)
def test_results_are_what_the_fakes_say(rule: fc.Rule, compact: bool):
    """Results do not alias inputs and have the strides and offsets of new tensors, also with an odd number of rows."""
    x = packed("iid", 5, torch.float32, (4, 0, 10)).x
    cu, d = offsets((4, 0, 10)), x[:, 0].contiguous()
    with fc.backend("triton"):
        for name, args in (("segment_pool", (x, None)), ("select_boundaries", (d,))):
            op = getattr(torch.ops.fastcompress, name).default
            args = *args, cu, None, None, *rule.op_args(), compact
            if not compact:
                starts, lengths = op(*args)[-3:-1]
                assert starts.storage_offset() == lengths.storage_offset() == 0
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_the_default_device_does_not_matter():
    """Numbers are converted to bits without a tensor on the default device."""
    x = features("iid", 20, 5, torch.float32)
    for rule in (fc.Threshold(0.7312), fc.LocalMax(prominence=0.1)):
        expected = DEFINITION["segment_pool"](x, None, None, None, None, *rule.op_args(), False)
        with torch.device("meta"):
            actual = OPS["segment_pool"](x, None, None, None, None, *rule.op_args(), False)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b, str(rule))


@pytest.mark.parametrize("value", [0.1, 1e-320, torch.inf, -torch.inf, 0.9999999999])
def test_bits_of_numbers(value: float):
    for dtype in (torch.float32, torch.float64):
        wanted = torch.tensor(value, dtype=dtype).double().view(torch.int64).item()
        assert tiles.rounded_threshold(value, dtype) == wanted
    assert common.double_bits(value) == torch.tensor(value, dtype=torch.float64).view(torch.int64).item()


def test_rows_that_are_too_wide():
    """Such rows would need more programs than a grid can have."""
    x, starts = torch.zeros(1, 2**21 + 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rows must not be wider than 2097152, got 2097153"):
        OPS["segment_reduce"](x, starts, starts + 1, "mean")
    with pytest.raises(RuntimeError, match="rows must not be wider than 2097152, got 2097153"):
        OPS["segment_max_backward"](x, x, x, starts, starts + 1)
    assert segment_grid(1, 2**21, segment_tile(2**21, torch.float64))[1] <= 65_535


@pytest.mark.parametrize("runs, kept", [(3, 3), (30, 30), (40, 41)])
def test_few_segments_do_not_hold_the_memory_of_many(runs: int, kept: int):
    """The bound is 41 segments. Results that are at least a tenth smaller are copied."""
    x = features("iid", runs, 4, torch.float32)[torch.arange(40) * runs // 40]
    args = None, None, None, *fc.Threshold(1e-4).op_args(), True
    d = DEFINITION["adjacent_distance"](x, None, None, 1)
    for results in (OPS["segment_pool"](x, None, *args), OPS["select_boundaries"](d, *args)):
        for tensor in results[:-1]:
            rows = tensor.untyped_storage().nbytes() // (tensor.element_size() * tensor[0].numel())
            assert (len(tensor), rows) == (runs, kept)
