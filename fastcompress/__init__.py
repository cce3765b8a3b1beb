"""Variable-length compression of audio frames for audio language models."""

from fastcompress import nn
from fastcompress.dispatch.backends import backend
from fastcompress.ops.adjacent_distance import adjacent_distance
from fastcompress.ops.banded_distance import banded_distance
from fastcompress.ops.greedy_segments import greedy_segments
from fastcompress.ops.integrate_and_fire import Fired, integrate_and_fire, quantity_loss
from fastcompress.ops.pack import pack
from fastcompress.ops.packed_inputs import PackedInputs
from fastcompress.ops.row_groups import row_groups
from fastcompress.ops.segment_pool import segment_pool
from fastcompress.ops.segment_reduce import segment_expand, segment_reduce
from fastcompress.ops.select_boundaries import (
    normalize_distance,
    segments_from_ids,
    segments_from_mask,
    segments_from_starts,
    select_boundaries,
)
from fastcompress.ops.token_merging import Merged, bipartite_merge, iterative_fusion
from fastcompress.rules import LabelChange, LocalMax, Lookback, MinVariance, PeakHeight, Rule, Threshold, TopK, Uniform
from fastcompress.segments import Pooled, Segments
from fastcompress.streaming import Streamed, StreamingIntegrateAndFire, StreamingSegmentPool
from fastcompress.version import __version__

__all__ = [
    "Fired",
    "LabelChange",
    "LocalMax",
    "Lookback",
    "Merged",
    "MinVariance",
    "PackedInputs",
    "PeakHeight",
    "Pooled",
    "Rule",
    "Segments",
    "Streamed",
    "StreamingIntegrateAndFire",
    "StreamingSegmentPool",
    "Threshold",
    "TopK",
    "Uniform",
    "__version__",
    "adjacent_distance",
    "backend",
    "banded_distance",
    "bipartite_merge",
    "greedy_segments",
    "integrate_and_fire",
    "iterative_fusion",
    "nn",
    "normalize_distance",
    "pack",
    "quantity_loss",
    "row_groups",
    "segment_expand",
    "segment_pool",
    "segment_reduce",
    "segments_from_ids",
    "segments_from_mask",
    "segments_from_starts",
    "select_boundaries",
]
