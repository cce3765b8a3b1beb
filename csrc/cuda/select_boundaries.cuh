// Segments from distances. The first kernel writes one byte of flags per row: whether a segment starts or stops there.
// Rules with min_len or max_len need a second kernel, in which one thread walks each sequence (rule.h); other rules
// decide every row independently. The last kernel compacts the flags into segments.
//
// Model, for N rows and M segments: the distances are read once, 4 N bytes (8 N for fp64), the flags are written and
// read, 2 N bytes, and 16 M bytes are written.
#pragma once

#include "params.h"
#include "tile.cuh"

namespace fastcompress::cuda {

constexpr uint8_t kStops = 1, kStarts = 2;

// One thread per row.
template <class S>
__global__ void __launch_bounds__(kThreads) select_flags_kernel(SelectParams p) {
  wait_for_previous_launch();
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const RowPlace place = place_row(p.sequences, p.row_group, row);
  if (needs_walk(p.rule)) {
    p.flags[row] = place.alive ? 0 : kStops;
    return;
  }
  bool stops = place.changes;
  if (!stops) {
    int64_t run = place.begin;
    if (p.row_group != nullptr) {
      // Uniform and prominences need the start of the run; a peak depends only on `order` distances before it.
      const bool all = p.rule.kind == RuleKind::kUniform || p.rule.prominence > 0;
      const int64_t reach = all ? row : p.rule.kind == RuleKind::kLocalMax ? p.rule.size : 0;
      const int64_t first = reach < row - 2 - place.begin ? row - 2 - reach : place.begin;
      for (run = row - 1; run > first && p.row_group[run - 1] == place.group;) --run;
    }
    stops = wants_boundary(p.rule, Scores<S>{static_cast<const S*>(p.d), p.row_group}, row, run, place.end);
  }
  const bool starts = stops && starts_segment(p.rule, place, p.row_group, row);
  p.flags[row] = uint8_t((stops ? kStops : 0) | (starts ? kStarts : 0));
}

// One thread per sequence. select_flags_kernel has marked the rows that are in no segment.
template <class S>
__global__ void __launch_bounds__(kThreads) select_walk_kernel(SelectParams p) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.sequences.count) return;
  const int64_t begin = p.sequences.begin[b], end = p.sequences.end[b];
  const Scores<S> scores{static_cast<const S*>(p.d), p.row_group};
  Walk(begin).advance(p.rule, scores, begin, end, end,
                      [&](int64_t start, int64_t) { p.flags[start] = kStops | kStarts; });
}

// One thread per row, one block per tile of kThreads rows.
static __global__ void __launch_bounds__(kThreads) select_compact_kernel(SelectParams p) {
  __shared__ RowBits starts_shared;
  __shared__ int64_t tile_shared, before_shared;
  const int thread = int(threadIdx.x);
  if (thread == 0) tile_shared = atomicAdd(&p.scratch.state->next_tile, 1u);
  __syncthreads();
  const int64_t tile = tile_shared, begin = tile * kThreads, row = begin + thread;
  const int64_t end = kThreads < p.rows - begin ? begin + kThreads : p.rows;
  const bool is_start = row < p.rows && (p.flags[row] & kStarts);
  starts_shared.vote(thread, is_start);
  __syncthreads();
  const RowBits starts = starts_shared;
  const int count = starts.count(0, kThreads);
  if (thread == 0) publish_count(p.scratch, tile, count);
  const int64_t sequence = begin == 0 ? 0 : upper_bound(p.sequences.end, p.sequences.count, begin);
  int64_t stop = row + 1;
  while (is_start && stop < p.rows && !(p.flags[stop] & kStops)) ++stop;
  __syncthreads();
  if (thread < 32) {
    const int64_t before = look_back(p.scratch, tile, count, thread);
    if (thread == 0) before_shared = before;
  }
  __syncthreads();
  const int64_t before = before_shared, index = before + starts.count(0, thread);
  const bool is_last = end == p.rows;
  write_cu_segments(p.out, p.sequences, sequence, starts, 0, begin, end, is_last, before, thread);
  if (is_start && index < p.out.bound) {
    p.out.starts[index] = row;
    p.out.lengths[index] = stop - row;
  }
  if (!is_last) return;
  if (before + count > p.out.bound && thread == 0) atomicOr(&p.scratch.state->error, int32_t(kTooManySegments));
  const int64_t total = before + count < p.out.bound ? before + count : p.out.bound;
  if (thread == 0) store_relaxed(&p.scratch.state->total, uint64_t(total) + 1);
  for (int64_t m = total + thread; p.out.clear_rest && m < p.out.bound; m += kThreads) {
    p.out.starts[m] = p.rows;
    p.out.lengths[m] = 0;
  }
}

}  // namespace fastcompress::cuda
