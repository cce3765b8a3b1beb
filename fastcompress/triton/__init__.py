"""Triton kernels: the ops of ``fastcompress.reference.OPS``, for devices for which there are no compiled kernels.
Those with no row wider than a number, of packing, are left to the reference.

Importing this package imports triton. The ops take and return what those of the reference do, with the same bits, on
any device that Triton runs on (under ``TRITON_INTERPRET=1`` the CPU). Each takes its tile sizes from the row width and
the dtype by a fixed rule; nothing is tuned at run time.
"""

from fastcompress.triton.adjacent_distance import adjacent_distance, adjacent_distance_backward
from fastcompress.triton.greedy_segments import greedy_boundaries
from fastcompress.triton.integrate_and_fire import integrate_rows, integrate_rows_backward
from fastcompress.triton.pack import pack_rows
from fastcompress.triton.segment_pool import segment_pool
from fastcompress.triton.segment_reduce import (
    segment_expand,
    segment_max_backward,
    segment_reduce,
    segment_weighted_mean,
    segment_weighted_mean_backward,
)
from fastcompress.triton.select_boundaries import select_boundaries

OPS = {
    op.__name__: op
    for op in (
        adjacent_distance,
        adjacent_distance_backward,
        select_boundaries,
        greedy_boundaries,
        segment_reduce,
        segment_max_backward,
        segment_weighted_mean,
        segment_weighted_mean_backward,
        integrate_rows,
        integrate_rows_backward,
        segment_expand,
        segment_pool,
        pack_rows,
    )
}
