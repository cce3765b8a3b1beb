// Fused segment pooling in one launch (after that of prepare.cuh): distances, boundaries, output offsets and means.
//
// One block processes a tile of rows, with the halo on which its boundaries depend: 1 + order rows before the tile and
// order rows after it. The block
//   1. copies the rows to shared memory asynchronously, if they are aligned and enough of them fit, so that each row is
//      read from device memory once; otherwise scoring and averaging both read global memory, the second time from a
//      cache;
//   2. computes the distances of neighbouring rows, with one group of lanes per pair;
//   3. decides the rows, with one thread per row that evaluates the rule (rule.h); warp ballots collect the results
//      into bitmasks;
//   4. gets the number of segments before the tile by a look-back over the tiles (tile.cuh);
//   5. averages every segment that starts in the tile. If the last one continues after the tile, the block searches for
//      its end and reads its rows from global memory. This is slow for long segments.
//
// Model, for x [N, D] of E-byte elements, a tile of R rows and M segments: (1 + H / R) N D E bytes are read, most of
// the H = 1 + 2 order (+ kExtraRows) halo rows from the second-level cache, and M D E written. Each element costs 2
// widenings of a half type, 2 multiplications and 2 additions to score (fp16: 2 fused), a widening and an addition to
// average, and 3 reads of shared memory.
#pragma once

#include "items.cuh"
#include "params.h"
#include "rows.cuh"
#include "sum.cuh"
#include "tile.cuh"

namespace fastcompress::cuda {

// Rows of the empty tail of the output that a block clears at once.
constexpr int kClearRows = 16;

template <class S>
struct PoolShared {
  double dots[kThreads], squares[kThreads];
  S d[kThreads];
  int32_t row_group[kThreads];
  RowBits changes, stops, starts;
  // The segments that start in the tile: first row, relative to the window, and length.
  int32_t rows[kThreads];
  int64_t lengths[kThreads];
  int64_t tile, before;
  uint32_t piece;
};

// Rows [first, last) that a block loads, at most kThreads; the rows [from, until) can be decided with them.
struct Window {
  int64_t first, last, from, until;
};

__device__ inline Window make_window(const Rule& rule, int64_t rows, int64_t from, int64_t length) {
  Window window;
  window.from = from;
  window.first = from > rows_before(rule) ? from - rows_before(rule) : 0;
  window.last = length < rows - window.first ? window.first + length : rows;
  window.until = window.last == rows ? rows : window.last - rows_after(rule);
  return window;
}

// Computes the distances between neighbouring rows of the window; row(i) returns a pointer to its i-th row.
template <class T, bool kAligned, class Row>
__device__ void score_window(const Row& row, int rows, int64_t width, int thread, PoolShared<accumulate_t<T>>& shared) {
  const GroupLane<T> at(thread);
  const int warp_group = (thread - thread % 32) / kGroupLanes<T>;  // group of the warp's first lane
  for (int base = 0; base + warp_group < rows; base += kThreads / kGroupLanes<T>) {
    // All lanes of a warp must take part in its shuffles; those without a row repeat the last one.
    const int i = base + at.group, a = i < rows ? i : rows - 1, b = a + 1 < rows ? a + 1 : a;
    double dot, square;
    group_dot_and_square<T, kAligned>(row(a), row(b), width, at.column(), dot, square);
    if (i < rows && at.lane == 0) {
      shared.dots[i] = dot;
      shared.squares[i] = square;
    }
  }
  __syncthreads();
  if (thread + 1 < rows)
    shared.d[thread] =
        accumulate_t<T>(cosine_distance(shared.dots[thread], shared.squares[thread], shared.squares[thread + 1]));
}

// Returns the start of the run of row `first`, searching backwards by kThreads rows at a time. All threads of the block
// call this; p.row_group is not null.
template <class S>
__device__ int64_t find_run(const PoolParams& p, int64_t first, int thread, PoolShared<S>& shared) {
  const RowPlace place = place_row(p.sequences, p.row_group, first);
  if (place.changes) return first;
  for (int64_t high = first;; high -= kThreads) {  // rows [high, first] are in one run
    const int64_t row = high - 1 - thread;
    const bool starts = row <= place.begin || p.row_group[row - 1] != place.group;
    shared.changes.vote(thread, starts);
    __syncthreads();
    const int nearest = shared.changes.first(0, kThreads);
    __syncthreads();
    if (nearest < kThreads) return high - 1 - nearest > place.begin ? high - 1 - nearest : place.begin;
  }
}

// Decides the rows [from, until) of a window whose distances are known. Bit i of shared.stops and shared.starts is set
// if the i-th row of the window stops or starts a segment.
template <class S>
__device__ void decide_window(const PoolParams& p, const Window& window, int thread, PoolShared<S>& shared) {
  const bool uniform = !p.rule.needs_distance();
  // Only Uniform needs the real start of the run; other rules read no row before the window.
  int64_t run = window.first;
  if (uniform && p.row_group != nullptr && window.first < window.last) run = find_run(p, window.first, thread, shared);
  const int64_t row = window.first + thread;
  RowPlace place;
  if (row < window.last) place = place_row(p.sequences, p.row_group, row);
  shared.row_group[thread] = place.group;
  shared.changes.vote(thread, place.changes);
  __syncthreads();
  bool stops = false, starts = false;
  if (window.from <= row && row < window.until) {
    stops = place.changes;
    if (!stops) {
      const int change = shared.changes.last(thread + 1);
      if (change >= 0) run = window.first + change;
      if (uniform && p.row_group == nullptr) run = place.begin;
      const Scores<S> scores{shared.d - window.first,
                             p.row_group == nullptr ? nullptr : shared.row_group - window.first};
      stops = wants_boundary(p.rule, scores, row, run, place.end);
    }
    starts = stops && starts_segment(p.rule, place, p.row_group, row);
  }
  shared.stops.vote(thread, stops);
  shared.starts.vote(thread, starts);
  __syncthreads();
}

// Returns the first row from `from` on that stops a segment, reading one window of rows after another from global
// memory. All threads of the block call this.
template <class T, bool kAligned>
__device__ int64_t find_stop(const PoolParams& p, int64_t from, int thread, PoolShared<accumulate_t<T>>& shared) {
  const T* keys = static_cast<const T*>(p.keys.data);
  while (from < p.x.count) {
    const Window window = make_window(p.rule, p.x.count, from, kThreads);
    if (p.rule.needs_distance()) {
      auto row = [&](int i) { return keys + (window.first + i) * p.keys.stride; };
      score_window<T, kAligned>(row, int(window.last - window.first), p.keys.width, thread, shared);
    }
    decide_window(p, window, thread, shared);
    const int until = int(window.until - window.first);
    const int stop = shared.stops.first(int(from - window.first), until);
    if (stop < until) return window.first + stop;
    from = window.until;
  }
  return p.x.count;
}

// Writes empty segments to the output rows after the last segment. All blocks that still run once the number of
// segments is known share the work; the block of the last tile always does.
template <class T, bool kAligned>
__device__ void clear_rest(const PoolParams& p, int thread, PoolShared<accumulate_t<T>>& shared) {
  const int vectors = int((p.x.width + kVector<T> - 1) / kVector<T>);
  Vector<T> zeros;
  memset(&zeros, 0, sizeof zeros);
  while (true) {
    __syncthreads();
    if (thread == 0) {
      const uint64_t total = load_acquire(&p.scratch.state->total);
      shared.before = total == 0 ? p.out.bound : int64_t(total - 1);  // 0: not known yet, leave the work to others
      shared.piece = total == 0 ? 0 : atomicAdd(&p.scratch.state->next_clear, 1u);
    }
    __syncthreads();
    const int64_t first = shared.before + int64_t(shared.piece) * kClearRows;
    if (first >= p.out.bound) return;
    const int rows = int(p.out.bound - first < kClearRows ? p.out.bound - first : kClearRows);
    T* values = static_cast<T*>(p.values) + first * p.x.width;
    for_each_vector(rows, vectors, thread, [&](int row, int vector) {
      store_vector<T, kAligned>(values + row * p.x.width, int64_t(vector) * kVector<T>, p.x.width, zeros);
    });
    if (thread < rows) {
      p.out.starts[first + thread] = p.x.count;
      p.out.lengths[first + thread] = 0;
    }
  }
}

template <class T, bool kAligned, bool kStaged>
__global__ void __launch_bounds__(kThreads, 4) segment_pool_fwd_kernel(PoolParams p) {
  using S = accumulate_t<T>;
  __shared__ PoolShared<S> shared;
  FASTCOMPRESS_DYNAMIC_SHARED(staged);
  const int thread = int(threadIdx.x);
  const T* x = static_cast<const T*>(p.x.data);
  const int vectors = int((p.x.width + kVector<T> - 1) / kVector<T>);

  if (thread == 0) shared.tile = atomicAdd(&p.scratch.state->next_tile, 1u);
  __syncthreads();
  const int64_t tile = shared.tile;
  const int64_t begin = tile * p.tile_rows, rows = p.x.count;
  const int64_t end = p.tile_rows < rows - begin ? begin + p.tile_rows : rows;
  const Window window =
      make_window(p.rule, rows, begin,
                  p.tile_rows + rows_before(p.rule) + rows_after(p.rule) + (p.rule.needs_distance() ? kExtraRows : 0));
  const int window_rows = int(window.last - window.first);

  // Pointers to row i of the window.
  auto staged_row = [&](int64_t i) { return reinterpret_cast<const T*>(staged + i * p.pitch); };
  auto global_row = [&](int64_t i) { return x + (window.first + i) * p.x.stride; };
  if constexpr (kStaged) {
    for_each_vector(window_rows, vectors, thread, [&](int row, int vector) {
      copy_async(staged + row * p.pitch + vector * 16, global_row(row) + vector * kVector<T>);
    });
    wait_for_copies();
    __syncthreads();
  }
  if (p.rule.needs_distance() && window_rows > 0) {
    if constexpr (kStaged) {
      score_window<T, kAligned>(staged_row, window_rows, p.x.width, thread, shared);
    } else {
      const T* keys = static_cast<const T*>(p.keys.data);
      auto row = [&](int i) { return keys + (window.first + i) * p.keys.stride; };
      score_window<T, kAligned>(row, window_rows, p.keys.width, thread, shared);
    }
  }
  decide_window(p, window, thread, shared);

  const int first_bit = int(begin - window.first), last_bit = int(end - window.first);
  const int until = int(window.until - window.first);
  const RowBits starts = shared.starts;
  const int count = starts.count(first_bit, last_bit);
  if (thread == 0) publish_count(p.scratch, tile, count);

  // Find the ends of the tile's segments. Only the last one can end after the decided rows.
  const bool is_start = first_bit <= thread && thread < last_bit && starts.at(thread);
  const int stop = is_start ? shared.stops.first(thread + 1, until) : 0;
  const int last_start = starts.last(last_bit);
  const bool open = last_start >= first_bit && shared.stops.first(last_start + 1, until) == until;
  __syncthreads();
  const int64_t last_stop = open ? find_stop<T, kAligned>(p, window.until, thread, shared) : 0;
  if (is_start) {
    const int m = starts.count(first_bit, thread);
    shared.rows[m] = thread;
    shared.lengths[m] = (stop < until ? window.first + stop : last_stop) - (window.first + thread);
  }
  if (thread < 32) {
    const int64_t before = look_back(p.scratch, tile, count, thread);
    if (thread == 0) shared.before = before;
  }
  __syncthreads();

  const int64_t before = shared.before;
  const bool is_last = end == rows;
  if (is_last && thread == 0) {
    const int64_t total = before + count < p.out.bound ? before + count : p.out.bound;
    store_release(&p.scratch.state->total, uint64_t(total) + 1);
  }
  write_cu_segments(p.out, p.sequences, starts, first_bit, begin, end, is_last, before, thread);
  // The bound holds for every valid batch; for an invalid one, nothing may be written after the end of the output.
  const int64_t room = p.out.bound - before;
  const int written = int(count < room ? count : room < 0 ? 0 : room);
  if (written < count && thread == 0) atomicOr(&p.scratch.state->error, int32_t(kTooManySegments));
  if (thread < written) {
    p.out.starts[before + thread] = window.first + shared.rows[thread];
    p.out.lengths[before + thread] = shared.lengths[thread];
  }
  T* values = static_cast<T*>(p.values) + before * p.x.width;
  for_each_vector(written, vectors, thread, [&](int m, int vector) {
    const int64_t column = int64_t(vector) * kVector<T>, first = shared.rows[m], length = shared.lengths[m];
    S mean[kVector<T>];
    auto sum = [&](const auto& row) {
      auto load = [&](int64_t i, S(&out)[kVector<T>]) {
        widen_vector<T>(load_vector<T, kAligned>(row(first + i), column, p.x.width), out);
      };
      ordered_sum<T>(length, load, Add<S>(), mean);
    };
    if (kStaged && first + length <= window_rows)
      sum(staged_row);
    else
      sum(global_row);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) mean[k] = mean[k] / S(length);
    store_vector<T, kAligned>(values + int64_t(m) * p.x.width, column, p.x.width, narrow_vector<T>(mean));
  });
  if (p.out.clear_rest) clear_rest<T, kAligned>(p, thread, shared);
}

}  // namespace fastcompress::cuda
