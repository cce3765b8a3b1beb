// Reductions over given segments, and their gradients. One warp processes a segment and 32 vectors of its columns, so
// that it reads contiguous parts of rows. There are no atomics: one thread writes each output element, with one order
// of operations.
//
// Model, for x [N, D] of E-byte elements and M segments: reduce reads N D E bytes and writes M D E; expand reads M D E
// and writes N D E, with D divisions per segment for a mean. first, last and middle read only M D E.
#pragma once

#include <limits>

#include "divide.h"
#include "given.cuh"
#include "tile.cuh"

namespace fastcompress::cuda {

// Returns `row` if it is greater than `best`, or if it is NaN and `best` is not. So the first of equal maxima is kept,
// and NaN wins.
template <class S>
struct LaterMax {
  static constexpr S kNone = -std::numeric_limits<S>::infinity();
  __device__ S operator()(S best, S row) const { return row > best || (row != row && best == best) ? row : best; }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) segment_reduce_fwd_kernel(ReduceParams p) {
  using S = accumulate_t<T>;
  const SegmentThread at;
  const int column = at.column<T>(), width = int(p.x.width);
  if (at.m >= p.segments.count || column >= width) return;
  const Segment segment = read_segment(p.segments, at.m);
  T* out = static_cast<T*>(p.out) + at.m * width;
  if (segment.length == 0) {
    store_vector<T, kAligned>(out, column, width, zero_vector<T>());
    return;
  }
  if (picks_a_row(p.reduce)) {
    const T* row = row_of<T>(p.x, picked_row(segment.start, segment.length, p.reduce));
    store_vector<T, kAligned>(out, column, width, load_vector<T, kAligned>(row, column, width));
    return;
  }
  S total[kVector<T>];
  const GlobalColumn<T, kAligned, Keep::kNo> rows{row_of<T>(p.x, segment.start) + column, p.x.stride, width - column};
  auto widen = [&](int64_t, const Vector<T>& vector, S(&row)[kVector<T>]) { widen_vector<T>(vector, row); };
  if (p.reduce == Reduce::kMax) {
    ordered_sum<T>(segment.length, rows, widen, LaterMax<S>(), total);
  } else {
    ordered_sum<T>(segment.length, rows, widen, Add<S>(), total);
    if (p.reduce == Reduce::kMean) divide<T>(total, Frames<S>(segment.length));
  }
  store_vector<T, kAligned>(out, column, width, narrow_vector<T>(total));
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) segment_weighted_mean_fwd_kernel(ReduceParams p) {
  using S = accumulate_t<T>;
  const SegmentThread at;
  const int column = at.column<T>(), width = int(p.x.width);
  if (at.m >= p.segments.count || column >= width) return;
  const Segment segment = read_segment(p.segments, at.m);
  T* out = static_cast<T*>(p.out) + at.m * width;
  const S* weights = static_cast<const S*>(p.weights) + segment.start;
  const S weight = segment.length == 0 ? S(0) : sum_of_weights(weights, segment.length);
  if (weight == 0) {
    store_vector<T, kAligned>(out, column, width, zero_vector<T>());
    return;
  }
  S total[kVector<T>];
  const GlobalColumn<T, kAligned, Keep::kNo> rows{row_of<T>(p.x, segment.start) + column, p.x.stride, width - column};
  auto weigh = [&](int64_t i, const Vector<T>& vector, S(&row)[kVector<T>]) {
    widen_vector<T>(vector, row);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) row[k] = row[k] * weights[i];
  };
  ordered_sum<T>(segment.length, rows, weigh, Add<S>(), total);
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) total[k] = total[k] / weight;
  store_vector<T, kAligned>(out, column, width, narrow_vector<T>(total));
}

// Writes 0 to rows [begin, end) of the output at one vector of columns.
template <class T, bool kAligned>
__device__ __forceinline__ void clear_rows(T* out, int64_t begin, int64_t end, int column, int width) {
  for (int64_t row = begin; row < end; ++row)
    store_vector<T, kAligned>(out + row * width, column, width, zero_vector<T>());
}

// The rows between segment m - 1 and segment m, which are in no segment; m may be the number of segments.
struct Gap {
  int64_t begin, end;

  __device__ Gap(const SegmentsIn& segments, int64_t m) {
    auto inside = [&](int64_t row) { return row < 0 ? 0 : row < segments.rows ? row : segments.rows; };
    begin = m == 0 ? 0 : inside(segment_end(segments, m - 1));
    end = m == segments.count ? segments.rows : inside(segments.starts[m]);
  }
};

template <class T, bool kAligned>
__device__ __forceinline__ void clear_gap(const SegmentsIn& segments, int64_t m, T* out, int column, int width) {
  const Gap gap(segments, m);
  clear_rows<T, kAligned>(out, gap.begin, gap.end, column, width);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) segment_expand_fwd_kernel(ReduceParams p) {
  using S = accumulate_t<T>;
  const SegmentThread at;
  const int column = at.column<T>(), width = int(p.x.width);
  if (at.m > p.segments.count || column >= width) return;
  T* out = static_cast<T*>(p.out);
  clear_gap<T, kAligned>(p.segments, at.m, out, column, width);
  if (at.m == p.segments.count) return;
  const Segment segment = read_segment(p.segments, at.m);
  if (segment.length == 0) return;
  Vector<T> vector = load_vector<T, kAligned>(row_of<T>(p.x, at.m), column, width);
  if (picks_a_row(p.reduce)) {
    clear_rows<T, kAligned>(out, segment.start, segment.start + segment.length, column, width);
    store_vector<T, kAligned>(out + picked_row(segment.start, segment.length, p.reduce) * width, column, width, vector);
    return;
  }
  if (p.reduce == Reduce::kMean) {
    S mean[kVector<T>];
    widen_vector<T>(vector, mean);
    divide<T>(mean, Frames<S>(segment.length));
    vector = narrow_vector<T>(mean);
  }
  for (int64_t i = 0; i < segment.length; ++i)
    store_vector<T, kAligned>(out + (segment.start + i) * width, column, width, vector);
}

// The gradient goes to the first frame that equals the maximum, or to the first NaN if the maximum is NaN.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) segment_max_bwd_kernel(ReduceParams p) {
  using S = accumulate_t<T>;
  const SegmentThread at;
  const int column = at.column<T>(), width = int(p.x.width);
  if (at.m > p.segments.count || column >= width) return;
  T* out = static_cast<T*>(p.out);
  clear_gap<T, kAligned>(p.segments, at.m, out, column, width);
  if (at.m == p.segments.count) return;
  const Segment segment = read_segment(p.segments, at.m);
  if (segment.length == 0) return;
  S best[kVector<T>], grad[kVector<T>];
  widen_vector<T>(load_vector<T, kAligned>(row_of<T>(p.y, at.m), column, width), best);
  widen_vector<T>(load_vector<T, kAligned>(row_of<T>(p.grad, at.m), column, width), grad);
  unsigned given = 0;  // one bit per element: its gradient has been written
  for (int64_t i = 0; i < segment.length; ++i) {
    S row[kVector<T>], result[kVector<T>];
    widen_vector<T>(load_vector<T, kAligned, Keep::kNo>(row_of<T>(p.x, segment.start + i), column, width), row);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const bool here = row[k] == best[k] || (row[k] != row[k] && best[k] != best[k]);
      const bool takes = here && !(given >> k & 1);
      result[k] = takes ? grad[k] : S(0);
      if (takes) given |= 1u << k;
    }
    store_vector<T, kAligned>(out + (segment.start + i) * width, column, width, narrow_vector<T>(result));
  }
}

// One warp per segment. With W the sum of the segment's weights:
// grad_x[t] = w[t] / W * grad, grad_weights[t] = (grad . x[t] - grad . y) / W.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) segment_weighted_mean_bwd_kernel(ReduceParams p) {
  using S = accumulate_t<T>;
  const int lane = int(threadIdx.x % 32);
  const int64_t m = int64_t(blockIdx.x) * kSegmentsPerBlock + threadIdx.x / 32;
  const int width = int(p.x.width);
  if (m > p.segments.count) return;
  T* out = static_cast<T*>(p.out);
  S* grad_weights = static_cast<S*>(p.grad_weights);
  const GroupLane<kVector<T>> at(lane);
  const int groups = 32 / kGroupLanes<T>;
  for (int column = lane * kVector<T>; column < width; column += 32 * kVector<T>)
    clear_gap<T, kAligned>(p.segments, m, out, column, width);
  const Gap gap(p.segments, m);
  for (int64_t t = gap.begin + lane; t < gap.end; t += 32) grad_weights[t] = 0;
  if (m == p.segments.count) return;
  const Segment segment = read_segment(p.segments, m);
  if (segment.length == 0) return;
  const S* weights = static_cast<const S*>(p.weights);
  const S total = sum_of_weights(weights + segment.start, segment.length);
  const T* grad = row_of<T>(p.grad, m);
  const double mean_slope = group_dot<T, kAligned>(grad, row_of<T>(p.y, m), width, at);
  for (int64_t base = 0; base < segment.length; base += groups) {
    const int64_t i = base + at.group;  // lanes without a row repeat the last one
    const int64_t t = segment.start + (i < segment.length ? i : segment.length - 1);
    const double slope = group_dot<T, kAligned>(grad, row_of<T>(p.x, t), width, at) - mean_slope;
    if (i >= segment.length) continue;
    if (at.lane == 0) grad_weights[t] = total == 0 ? S(0) : S(slope / double(total));
    const S share = total == 0 ? S(0) : weights[t] / total;
    for (int column = at.column(); column < width; column += kLanes) {
      S result[kVector<T>];
      widen_vector<T>(load_vector<T, kAligned>(grad, column, width), result);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) result[k] = total == 0 ? S(0) : share * result[k];
      store_vector<T, kAligned>(out + t * width, column, width, narrow_vector<T>(result));
    }
  }
}

}  // namespace fastcompress::cuda
