"""Selection and pooling have the bits of the definition in every layout, across tiles, with keys and strides.

Run by tests/triton/test_triton.py. By hand: ``TRITON_INTERPRET=1 pytest tests/triton/interpreted/pooling.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcompress as fc
from fastcompress.reference import OPS as DEFINITION
from fastcompress.triton import tiles
from tests.support.sample_inputs import (
    DTYPES,
    FEATURES,
    RULES,
    Batch,
    batches,
    expanded,
    features,
    offsets,
    packed,
    padded,
    row_groups,
    strided,
)
from tests.support.slow import some
from tests.support.triton_interpreter import (
    FUSED,
    QUICK,
    SHORT,
    check,
    layout,
    layouts,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, for infinities

TILED = some(FUSED, fc.Uniform(3, tail="drop"), fc.Threshold(0.15), fc.LocalMax(order=16))


def check_selection(batch: Batch, dtype: torch.dtype, rules: tuple[fc.Rule, ...], compact: bool) -> None:
    d = (batch.x[..., 0] * 0.3 + 0.5).to(dtype)
    for rule in rules:
        args = *layout(batch), *rule.op_args(), compact
        check("select_boundaries", d, *args, what=f"{batch}, {rule}, compact={compact}")


# The last threshold differs from 1 only in fp64.
SELECTED = (*RULES, fc.LocalMax(order=3), fc.LocalMax(threshold=0.9999999999))


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_select_boundaries(dtype: torch.dtype):
    names = ("packed", "grouped") if dtype == torch.float32 else ("padded-iid", "grouped-padded")
    for i, batch in enumerate(b for b in layouts(5, torch.float64, "iid") if b.name.startswith(names)):
        check_selection(
            batch, dtype, SELECTED if i == 0 and dtype == torch.float32 else SELECTED[i % 2 :: 2], i % 2 == 0
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_boundaries_in_every_layout(dtype: torch.dtype):
    for batch in batches(5, torch.float64, "iid"):
        for compact in (True, False):
            check_selection(batch, dtype, SELECTED, compact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_pool_in_every_layout_by_every_rule(dtype: torch.dtype):
    for batch in batches(33, dtype):
        for rule in RULES:
            for compact in (True, False):
                args = None, *layout(batch), *rule.op_args(), compact
                check("segment_pool", batch.x, *args, what=f"{batch}, {rule}, compact={compact}")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_segment_pool(dtype: torch.dtype):
    # test_segment_pool_in_every_layout_by_every_rule tests all rules in every layout.
    rules = (fc.Uniform(3, tail="drop"), fc.LocalMax(), fc.LocalMax(order=2, min_len=2, max_len=5))
    for i, batch in enumerate(layouts(17, dtype)):
        rule, compact = rules[i % 3], i % 2 == 0
        args = None, *layout(batch), *rule.op_args(), compact
        check("segment_pool", batch.x, *args, what=f"{batch}, {rule}, compact={compact}")
    for kind in FEATURES if dtype == torch.float32 else ("nonfinite", "huge"):
        batch = packed(kind, 33, dtype)
        check("segment_pool", batch.x, None, *layout(batch), *fc.LocalMax().op_args(), True, what=str(batch))


def run_lengths(kind: str) -> Tensor:
    """Return lengths of runs of equal rows, longer than a block of a sum and than tiles, or short."""
    if kind == "long":
        return torch.tensor([3, 190, 1, 1, 130, 64, 65, 2])
    return torch.tensor([1, 2, 3, 4] * 50)


@pytest.mark.parametrize("rule", TILED, ids=str)
def test_tiles(rule: fc.Rule):
    window = tiles.scored_window(*rule.op_args()[:2], torch.float32)
    for kind in ("long", "short"):
        lengths = run_lengths(kind)
        x = features("iid", len(lengths), 9, torch.float32).repeat_interleave(lengths, 0)
        assert len(x) > 3 * window.owned
        x += torch.randn(x.shape) * 1e-3 * (kind == "short")
        groups = row_groups(len(x)).repeat_interleave(3)[: len(x)]
        cu = offsets((200, 0, 1, len(x) - 201))
        layouts = {"groups": (cu, None, groups)}
        layouts |= {"one": (None, None, None)} if kind == "long" else {"some": (cu, None, None)}
        for name, args in layouts.items():
            compact = (name == "groups") == (kind == "long")
            what = f"{kind}, {name}, compact={compact}"
            check("segment_pool", x, None, *args, *rule.op_args(), compact, what=what)


def test_a_run_of_one_group_from_far_before_the_tile():
    x = features("iid", 700, 3, torch.float32)
    groups = torch.full((700,), 2, dtype=torch.int32)
    groups[5] = 3
    for rule in (fc.Uniform(7), fc.Uniform(7, tail="drop"), fc.Uniform(500), fc.Uniform(500, tail="drop")):
        check("segment_pool", x, None, None, None, groups, *rule.op_args(), True, what=str(rule))


@pytest.mark.parametrize("size", [39, 40, 41, 2**63 - 1])
def test_sizes_and_orders_beyond_all_rows(size: int):
    x = features("iid", 40, 3, torch.float32)
    d = DEFINITION["adjacent_distance"](x, None, None, 1)
    for rule in (fc.Uniform(size), fc.Uniform(size, tail="drop"), fc.LocalMax(order=size)):
        check("segment_pool", x, None, None, None, None, *rule.op_args(), False, what=str(rule))
        check("select_boundaries", d, None, None, None, *rule.op_args(), False, what=str(rule))


def test_limits_over_tiles():
    lengths = run_lengths("long")[:5]
    x = features("iid", len(lengths), 9, torch.float32).repeat_interleave(lengths, 0)
    for rule in (
        fc.Threshold(0.1, min_len=150),
        fc.Threshold(0.1, max_len=140),
        fc.LocalMax(order=400),
        fc.LocalMax(prominence=0.01),
    ):
        check("segment_pool", x, None, None, None, None, *rule.op_args(), True, what=str(rule))


@pytest.mark.parametrize("key_dtype", QUICK, ids=str)
def test_keys_are_scored_and_x_is_pooled(key_dtype: torch.dtype):
    for dtype in DTYPES:
        # Packed rows take one pass and padded rows three steps; both run with keys of each dtype of x.
        batches = {
            fc.LocalMax(): packed("iid", 33, dtype, SHORT),
            fc.Threshold(0.9, min_len=2): padded("iid", 33, dtype, SHORT),
        }
        for rule, batch in batches.items():
            keys = features("iid", batch.x[..., 0].numel(), 48, key_dtype, seed=2).view(*batch.x.shape[:-1], 48)
            args = batch.x, keys, *layout(batch), *rule.op_args(), True
            check("segment_pool", *args, what=f"{batch}, {rule}")


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype):
    for batch in (packed("smooth", 20, dtype, SHORT), padded("smooth", 20, dtype, SHORT)):
        for name, x in strided(batch.x):
            args = *layout(batch), *fc.LocalMax().op_args(), True
            check("segment_pool", x, None, *args, what=f"{batch}, {name}")
            if batch.x.dim() == 2:
                check("adjacent_distance", x, *layout(batch)[:2], 1, what=f"{batch}, {name}")
    for name, x in expanded(40, 20, dtype):
        check("segment_pool", x, None, None, None, None, *fc.Threshold(0.1).op_args(), True, what=name)
        starts, lengths = torch.tensor([0, 10]), torch.tensor([10, 20])
        check("segment_reduce", x, starts, lengths, "mean", what=name)
        check("segment_expand", x[:2], starts, lengths, 40, "mean", what=name)
