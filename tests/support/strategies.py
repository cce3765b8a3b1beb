"""Strategies of hypothesis for ragged batches and rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcompress as fc
from tests.support.sample_inputs import DTYPES, FEATURES, features, offsets, row_groups, strided

LAYOUTS = ("one-sequence", "packed", "grouped", "padded", "masked", "grouped-padded")


@dataclass
class Case:
    """A batch, a rule, and the rows that must be in a segment."""

    x: Tensor
    layout: dict[str, Tensor]
    rule: fc.Rule
    inside: Tensor  # [rows] bool: neither padding nor dropped
    sequence: Tensor  # [rows], the sequence of each row that is inside


@st.composite
def rules(draw) -> fc.Rule:
    if draw(st.booleans()):
        return fc.Uniform(draw(st.integers(1, 9)), draw(st.sampled_from(["keep", "drop"])))
    min_len = draw(st.integers(1, 6))
    max_len = draw(st.none() | st.integers(min_len, 9))
    threshold = draw(st.sampled_from([-1.0, 0.0, 0.15, 0.9, 1.0]))
    if draw(st.booleans()):
        return fc.Threshold(threshold, min_len, max_len)
    prominence = draw(st.none() | st.just(0.2))
    return fc.LocalMax(draw(st.integers(1, 12)), draw(st.none() | st.just(threshold)), prominence, min_len, max_len)


@st.composite
def every_rule(draw) -> fc.Rule:
    """Draw a rule of any kind. Some thresholds are larger than every distance."""
    lengths = {"min_len": draw(st.integers(1, 6) | st.just(2**63 - 1))}
    lengths["max_len"] = draw(st.none() | st.integers(lengths["min_len"], max(9, lengths["min_len"])))
    threshold = draw(st.sampled_from([-torch.inf, -1.0, 0.0, 0.04, 0.15, 0.9, 1.0, 2.0, torch.inf, 1e300]))
    kind = draw(st.integers(0, 7))
    if kind == 0:
        size = draw(st.integers(1, 9) | st.just(2**63 - 1))
        return fc.Uniform(size, draw(st.sampled_from(["keep", "drop"])))
    if kind == 1:
        return fc.Threshold(threshold, **lengths)
    if kind == 2:
        order, limit = draw(st.integers(1, 12) | st.just(2**63 - 1)), draw(st.none() | st.just(threshold))
        prominence = draw(st.sampled_from([None, -1.0, 0.0, 0.2, torch.inf]))
        return fc.LocalMax(order, limit, prominence, **lengths, normalize=draw(st.booleans()))
    if kind == 3:
        if draw(st.booleans()):
            return fc.TopK(rate=draw(st.floats(1, 50) | st.just(1e300)))
        return fc.TopK(count=draw(st.integers(1, 9) | st.just(2**63 - 1)))
    if kind == 4:
        return fc.LabelChange(draw(st.none() | st.integers(-1, 2)), **lengths)
    if kind == 5:
        return fc.Lookback(draw(st.integers(1, 5)), threshold, **lengths)
    if kind == 6:
        max_len = draw(st.integers(1, 12))
        return fc.MinVariance(draw(st.floats(1, max_len)), max_len)
    return fc.PeakHeight(threshold, **lengths)


widths = st.sampled_from([1, 2, 31, 32, 33, 95, 1023]) | st.integers(1, 80)


@st.composite
def batch(draw, widths: st.SearchStrategy[int] = widths) -> Case:
    lengths = tuple(draw(st.lists(st.integers(0, 3) | st.integers(0, 40), max_size=6)))
    layout = draw(st.sampled_from(LAYOUTS))
    dtype, index = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([torch.int32, torch.int64]))
    width, kind, seed = draw(widths), draw(st.sampled_from(FEATURES)), draw(st.integers(0, 99))
    arguments: dict[str, Tensor] = {}
    if layout in ("one-sequence", "packed", "grouped"):
        x = features(kind, sum(lengths), width, dtype, seed)
        inside = torch.ones(len(x), dtype=torch.bool)
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        if layout == "one-sequence":
            sequence = torch.zeros(len(x), dtype=torch.int64)
        else:
            arguments["cu_seqlens"] = offsets(lengths, index)
    else:
        padded = max(lengths, default=0) + draw(st.integers(0, 3))
        x = features(kind, len(lengths) * padded, width, dtype, seed).view(len(lengths), padded, width)
        inside = torch.ones(len(lengths), padded, dtype=torch.bool)
        if layout != "masked" and draw(st.booleans()):
            arguments["lengths"] = torch.tensor(lengths, dtype=index)
            inside = torch.arange(padded) < arguments["lengths"][:, None]
        sequence = torch.arange(len(lengths))[:, None].expand(-1, padded)
    if "grouped" in layout:
        group = row_groups(inside.numel(), seed).view(inside.shape)
        arguments["row_group"] = group
        inside = inside & (group >= 0)
    if layout == "masked":
        arguments["attention_mask"] = torch.rand(inside.shape) < 0.8
        inside = arguments["attention_mask"]
    memory = draw(st.sampled_from(["plain", "row gap", "column slice", "column step", "transposed", "unaligned"]))
    if memory != "plain":
        x = dict(strided(x))[memory]
    return Case(x, arguments, draw(rules()), inside.flatten(), sequence.flatten())


def check(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
