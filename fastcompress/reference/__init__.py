"""Pure PyTorch implementations of every op: slow, simple, and the definition that every kernel must match.

They are registered for every device, with a lower priority than compiled kernels.
"""

from fastcompress.reference.adjacent_distance import adjacent_distance, adjacent_distance_backward
from fastcompress.reference.banded_distance import banded_distance
from fastcompress.reference.greedy_segments import greedy_boundaries
from fastcompress.reference.integrate_and_fire import integrate_rows, integrate_rows_backward
from fastcompress.reference.min_variance import min_variance_boundaries
from fastcompress.reference.pack import pack_labels, pack_map, pack_rows
from fastcompress.reference.segment_pool import segment_pool
from fastcompress.reference.segment_reduce import (
    segment_expand,
    segment_max_backward,
    segment_reduce,
    segment_weighted_mean,
    segment_weighted_mean_backward,
)
from fastcompress.reference.select_boundaries import select_boundaries

OPS = {
    op.__name__: op
    for op in (
        adjacent_distance,
        adjacent_distance_backward,
        banded_distance,
        select_boundaries,
        min_variance_boundaries,
        greedy_boundaries,
        segment_reduce,
        segment_max_backward,
        segment_weighted_mean,
        segment_weighted_mean_backward,
        integrate_rows,
        integrate_rows_backward,
        segment_expand,
        segment_pool,
        pack_map,
        pack_labels,
        pack_rows,
    )
}
