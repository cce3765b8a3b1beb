// Fused segment pooling in one launch (after that of prepare.cuh): distances, boundaries, output offsets and means.
//
// One block processes a tile of rows, with the halo on which its boundaries depend: 1 + order rows before the tile and
// order rows after it. The block
//   1. copies the rows to shared memory asynchronously, if they are aligned and enough of them fit, so that each row is
//      read from device memory once; otherwise scoring and averaging both read global memory, the second time from a
//      cache. Meanwhile it searches for the sequences of its rows;
//   2. computes the distances of neighbouring rows, with one group of lanes per pair or two (score.cuh);
//   3. decides the rows, with one thread per row that evaluates the rule (rule.h); warp ballots collect the results
//      into bitmasks. If the last segment continues after the tile, the block scores and decides further rows in global
//      memory, kThreads at a time, until it finds the end;
//   4. gets the number of segments before the tile by a look-back over the tiles (tile.cuh);
//   5. averages every segment that starts in the tile. Rows after the tile are read from global memory. This is slow
//      for long segments.
//
// Model, for x [N, D] of E-byte elements, a tile of R rows and M segments: (1 + H / R) N D E bytes are read, most of
// the H = 1 + 2 order + kExtraRows halo rows from the second-level cache, and M D E written. Instructions of a lane for
// bf16, read from the SASS of sm_90:
//   scoring:    48.5 for each pair of rows and 8 columns (3 loads, 24 widenings, 32 multiplications and 32 additions
//               for two pairs and 4 columns), which is 6.1 for each element of the window;
//   averaging:  145 for a segment of 3 rows at 8 columns (loads, widenings and additions 61, division 57, store and
//               loop 27), which is 6.0 for each element of the tile.
// pool_plan.cpp chooses R.
#pragma once

#include "divide.h"
#include "items.cuh"
#include "params.h"
#include "score.cuh"
#include "sum.cuh"
#include "tile.cuh"

namespace fastcompress::cuda {

// Rows of the empty tail of the output that a block clears at once.
constexpr int kClearRows = 16;

// A segment that starts in the tile: its first row, relative to the window, and the divisor of its mean. `staged` is
// its length if all of its rows are in the window, else 0.
template <class S>
struct alignas(8) TileSegment {
  int32_t row, staged;
  Frames<S> frames;
};

template <class S>
struct PoolShared {
  double dots[kThreads], squares[kThreads];
  S d[kThreads];
  int32_t row_group[kThreads];
  RowBits changes, stops, starts;
  alignas(16) TileSegment<S> segments[kThreads];
  int64_t lengths[kThreads];
  int64_t tile, before, sequence;
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

// How rows are scored: a group of 32 / kElements lanes scores kPairs pairs of neighbouring rows. For half types two
// pairs share a row, which halves the widenings and loads of the row between them.
template <class T>
constexpr int kPairs = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kElements = sizeof(T) == 8 ? 2 : 4;

// Computes the dot products and squares of the rows of the window, in groups of 32 / N lanes.
template <bool kAligned, int N, class T, class Row>
__device__ __forceinline__ void score_groups(const Row& row, int rows, int width, int thread,
                                             PoolShared<accumulate_t<T>>& shared) {
  constexpr int K = kPairs<T>;
  const GroupLane<N> at(thread);
  // The group of the warp's first lane. By the shuffle the compiler knows that it is the same on all lanes; otherwise
  // it would add code for shuffles of lanes that have diverged.
  const int warp_group = __shfl_sync(~0u, at.group, 0);
  for (int base = 0; (base + warp_group) * K < rows; base += kThreads / at.kGroup) {
    // All lanes of a warp must take part in its shuffles; those without a row repeat the last one.
    const int first = (base + at.group) * K;
    const T* pointers[K + 1];
#pragma unroll
    for (int k = 0; k <= K; ++k) pointers[k] = row(first + k < rows ? first + k : rows - 1);
    double dots[K], squares[K];
    score_rows<kAligned, 0>(pointers, width, at, dots, squares);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (at.lane != k || first + k >= rows) continue;
      shared.dots[first + k] = dots[k];
      shared.squares[first + k] = squares[k];
    }
  }
}

// Computes the distances between neighbouring rows of the window; row(i) returns a pointer to its i-th row. With few
// rows twice as many lanes per row work, so that fewer threads are idle.
template <class T, bool kAligned, bool kWiden, class Row>
__device__ __forceinline__ void score_window(const Row& row, int rows, int width, int thread,
                                             PoolShared<accumulate_t<T>>& shared) {
  constexpr int N = kElements<T>;
  if (kWiden && (rows + kPairs<T> - 1) / kPairs<T> * (2 * kLanes / N) <= kThreads)
    score_groups<kAligned, N / 2, T>(row, rows, width, thread, shared);
  else
    score_groups<kAligned, N, T>(row, rows, width, thread, shared);
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

// What the decision on a row needs besides the distances.
struct RowContext {
  RowPlace place;
  int64_t run;  // first row of the run that the first row of the window is in, or the first row of the window
};

// Reads the sequence and the group of each row of a window, one row per thread. All threads of the block call this, and
// a barrier must follow.
template <class S>
__device__ RowContext place_window(const PoolParams& p, const Window& window, int thread, PoolShared<S>& shared) {
  RowContext context;
  context.run = window.first;
  // Only Uniform needs the real start of the run; other rules read no row before the window.
  if (!p.rule.needs_distance() && p.row_group != nullptr && window.first < window.last)
    context.run = find_run(p, window.first, thread, shared);
  const int64_t row = window.first + thread;
  if (row < window.last) context.place = place_row(p.sequences, p.row_group, row);
  shared.row_group[thread] = context.place.group;
  shared.changes.vote(thread, context.place.changes);
  return context;
}

// Decides the rows [from, until) of a window whose distances are known. Bit i of shared.stops and shared.starts is set
// if the i-th row of the window stops or starts a segment. Returns whether the row of this thread starts one.
template <class S>
__device__ bool decide_window(const PoolParams& p, const Window& window, const RowContext& context, int thread,
                              PoolShared<S>& shared) {
  __syncthreads();
  const RowPlace& place = context.place;
  const int64_t row = window.first + thread;
  bool stops = false, starts = false;
  if (window.from <= row && row < window.until) {
    stops = place.changes;
    if (!stops) {
      int64_t run = context.run;
      const int change = shared.changes.last(thread + 1);
      if (change >= 0) run = window.first + change;
      if (!p.rule.needs_distance() && p.row_group == nullptr) run = place.begin;
      const Scores<S> scores{shared.d - window.first,
                             p.row_group == nullptr ? nullptr : shared.row_group - window.first};
      stops = wants_boundary(p.rule, scores, row, run, place.end);
    }
    starts = stops && starts_segment(p.rule, place, p.row_group, row);
  }
  shared.stops.vote(thread, stops);
  shared.starts.vote(thread, starts);
  __syncthreads();
  return starts;
}

// Writes empty segments to the output rows after the last segment. All blocks that still run once the number of
// segments is known share the work; the block of the last tile always does.
template <class T, bool kAligned>
__device__ void clear_rest(const PoolParams& p, int thread, PoolShared<accumulate_t<T>>& shared) {
  const int vectors = int((p.x.width + kVector<T> - 1) / kVector<T>);
  while (true) {
    __syncthreads();
    if (thread == 0) {
      const uint64_t total = load_relaxed(&p.scratch.state->total);
      shared.before = total == 0 ? p.out.bound : int64_t(total - 1);  // 0: not known yet, leave the work to others
      shared.piece = total == 0 ? 0 : atomicAdd(&p.scratch.state->next_clear, 1u);
    }
    __syncthreads();
    const int64_t first = shared.before + int64_t(shared.piece) * kClearRows;
    if (first >= p.out.bound) return;
    const int rows = int(p.out.bound - first < kClearRows ? p.out.bound - first : kClearRows);
    T* values = static_cast<T*>(p.values) + first * p.x.width;
    for_each_vector(rows, vectors, thread, [&](int row, int vector) {
      store_vector<T, kAligned>(values + row * p.x.width, vector * kVector<T>, int(p.x.width), zero_vector<T>());
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
  const int width = int(p.x.width), vectors = (width + kVector<T> - 1) / kVector<T>;

  wait_for_previous_launch();
  if (thread == 0) shared.tile = atomicAdd(&p.scratch.state->next_tile, 1u);
  __syncthreads();
  const int64_t tile = shared.tile;
  const int64_t begin = tile * p.tile_rows, rows = p.x.count;
  const int64_t end = p.tile_rows < rows - begin ? begin + p.tile_rows : rows;
  const Window tile_window = make_window(p.rule, rows, begin, p.tile_rows + pool_halo(p.rule));
  const int window_rows = int(tile_window.last - tile_window.first);

  // Pointers to row i of the tile's window.
  auto staged_row = [&](int i) { return reinterpret_cast<const T*>(staged + i * p.pitch); };
  const SharedAddress staged_at = shared_address(staged);
  auto global_row = [&](int64_t i) { return x + (tile_window.first + i) * p.x.stride; };
  if constexpr (kStaged)
    copy_rows(staged_at, p.pitch, global_row(0), p.x.stride * int64_t(sizeof(T)), window_rows, vectors, thread);

  // Decide the rows of the tile's window and, if its last segment ends after them, of one window after another until
  // its end is found.
  const int first_bit = int(begin - tile_window.first), last_bit = int(end - tile_window.first);
  RowBits starts;
  bool is_start = false;
  int count = 0, stop = 0;
  int64_t sequence = 0, last_stop = 0;
  Window window = tile_window;
  for (bool in_tile = true;; in_tile = false) {
    // The searches among the sequences run while the rows of the tile are copied.
    const RowContext context = place_window(p, window, thread, shared);
    if (in_tile) {
      if (thread == first_bit) shared.sequence = context.place.sequence;
      if constexpr (kStaged) {
        wait_for_copies();
        __syncthreads();
      }
    }
    if (p.rule.needs_distance() && window.first < window.last) {
      const int scored = int(window.last - window.first);
      if (kStaged && in_tile) {
        score_window<T, kAligned, true>(staged_row, scored, width, thread, shared);
      } else {
        const T* keys = static_cast<const T*>(p.keys.data) + window.first * p.keys.stride;
        auto row = [&](int i) { return keys + i * p.keys.stride; };
        score_window<T, kAligned, !kStaged>(row, scored, int(p.keys.width), thread, shared);
      }
    }
    const bool starts_here = decide_window(p, window, context, thread, shared);
    const int until = int(window.until - window.first);
    bool open;
    if (in_tile) {
      starts = shared.starts;
      count = starts.count(first_bit, last_bit);
      if (thread == 0) publish_count(p.scratch, tile, count);
      is_start = starts_here && thread < last_bit;
      if (is_start) stop = shared.stops.first(thread + 1, until);
      const int last_start = starts.last(last_bit);
      open = last_start >= first_bit && shared.stops.first(last_start + 1, until) == until;
      sequence = shared.sequence;
    } else {
      const int found = shared.stops.first(int(window.from - window.first), until);
      open = found == until;
      last_stop = window.first + found;
    }
    if (!open) break;
    last_stop = rows;
    if (window.until == rows) break;
    __syncthreads();
    window = make_window(p.rule, rows, window.until, kThreads);
  }
  // Only the last segment of the tile can end after the tile's window.
  const int until = int(tile_window.until - tile_window.first);
  if (is_start) {
    const int m = starts.count(first_bit, thread);
    const int64_t length = (stop < until ? tile_window.first + stop : last_stop) - (tile_window.first + thread);
    shared.segments[m] = {thread, kStaged && thread + length <= window_rows ? int32_t(length) : 0, Frames<S>(length)};
    shared.lengths[m] = length;
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
    store_relaxed(&p.scratch.state->total, uint64_t(total) + 1);
  }
  write_cu_segments(p.out, p.sequences, sequence, starts, first_bit, begin, end, is_last, before, thread);
  // The bound holds for every valid batch; for an invalid one, nothing may be written after the end of the output.
  const int64_t room = p.out.bound - before;
  const int written = int(count < room ? count : room < 0 ? 0 : room);
  if (written < count && thread == 0) atomicOr(&p.scratch.state->error, int32_t(kTooManySegments));
  if (thread < written) {
    p.out.starts[before + thread] = tile_window.first + shared.segments[thread].row;
    p.out.lengths[before + thread] = shared.lengths[thread];
  }
  T* values = static_cast<T*>(p.values) + before * p.x.width;
  for_each_vector(written, vectors, thread, [&](int m, int vector) {
    const int column = vector * kVector<T>;
    const TileSegment<S> segment = shared.segments[m];
    S mean[kVector<T>];
    auto widen = [](auto, const Vector<T>& row, S(&out)[kVector<T>]) { widen_vector<T>(row, out); };
    if (segment.staged > 0) {
      const SharedColumn<T> rows{staged_at + segment.row * p.pitch + vector * 16, p.pitch};
      ordered_sum<T>(segment.staged, rows, widen, Add<S>(), mean);
    } else {
      const GlobalColumn<T, kAligned> rows{global_row(segment.row) + column, p.x.stride, width - column};
      ordered_sum<T>(shared.lengths[m], rows, widen, Add<S>(), mean);
    }
    divide<T>(mean, segment.frames);
    store_vector<T, kAligned>(values + m * width, column, width, narrow_vector<T>(mean));
  });
  if (p.out.clear_rest) clear_rest<T, kAligned>(p, thread, shared);
}

}  // namespace fastcompress::cuda
