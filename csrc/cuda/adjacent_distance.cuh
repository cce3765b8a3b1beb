// Cosine distances between rows `lag` apart, and their gradient. One group of lanes (rows.cuh) processes one row.
//
// Model, for x [N, D] of E-byte elements: forward reads N D E bytes from device memory, the partner of each row from a
// cache (for a small lag it is the row of a neighbouring group), and writes 4 N. Backward reads N D E bytes likewise, a
// row and its two partners per group, and writes N D E.
#pragma once

#include "params.h"
#include "rows.cuh"
#include "tile.cuh"

namespace fastcompress::cuda {

// Returns whether rows t and t + lag are frames of the same sequence.
__device__ inline bool is_pair(const Sequences& sequences, int64_t t, int64_t lag) {
  if (t < 0) return false;
  const int64_t b = upper_bound(sequences.end, sequences.count, t);
  return b < sequences.count && sequences.begin[b] <= t && lag < sequences.end[b] - t;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) adjacent_distance_fwd_kernel(DistanceParams p) {
  using S = accumulate_t<T>;
  const GroupLane<T> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const bool inside = t < p.x.count, pair = inside && is_pair(p.sequences, t, p.lag);
  // Lanes without a pair use row 0, because all lanes of a warp must take part in its shuffles.
  const T* a = static_cast<const T*>(p.x.data) + (pair ? t * p.x.stride : 0);
  const T* b = pair ? a + p.lag * p.x.stride : a;
  double dot, square_a;
  group_dot_and_square<T, kAligned>(a, b, p.x.width, at.column(), dot, square_a);
  const double square_b = group_dot<T, kAligned>(b, b, p.x.width, at.column());
  if (inside && at.lane == 0) static_cast<S*>(p.out)[t] = pair ? S(cosine_distance(dot, square_a, square_b)) : S(NAN);
}

// Factors in the gradients of the two rows of a pair: `cross` for the other row, `own_first` and `own_second` for the
// first and the second row itself.
struct PairSlopes {
  bool pair = false;
  double cross = 0, own_first = 0, own_second = 0;

  __device__ void set(double dot, double square_a, double square_b, double grad) {
    if (square_a == 0 && square_b == 0) return;
    const double norm_a = clamped_norm(square_a), norm_b = clamped_norm(square_b);
    const double cosine = dot / (norm_a * norm_b);
    pair = true;
    cross = -grad / (norm_a * norm_b);
    own_first = norm_a > kDistanceEps ? cosine / (norm_a * norm_a) * grad : 0;
    own_second = norm_b > kDistanceEps ? cosine / (norm_b * norm_b) * grad : 0;
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) adjacent_distance_bwd_kernel(DistanceParams p) {
  using S = accumulate_t<T>;
  const GroupLane<T> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const bool inside = t < p.x.count;
  const bool has_next = inside && is_pair(p.sequences, t, p.lag);
  const bool has_previous = inside && is_pair(p.sequences, t - p.lag, p.lag);
  const T* row = static_cast<const T*>(p.x.data) + (inside ? t * p.x.stride : 0);
  const T* next = has_next ? row + p.lag * p.x.stride : row;
  const T* previous = has_previous ? row - p.lag * p.x.stride : row;
  double dot_next, dot_previous, square, square_previous;
  group_dot_and_square<T, kAligned>(row, next, p.x.width, at.column(), dot_next, square);
  group_dot_and_square<T, kAligned>(previous, row, p.x.width, at.column(), dot_previous, square_previous);
  const double square_next = group_dot<T, kAligned>(next, next, p.x.width, at.column());
  if (!inside) return;
  const S* grad = static_cast<const S*>(p.grad);
  PairSlopes after, before;
  if (has_next) after.set(dot_next, square, square_next, double(grad[t]));
  if (has_previous) before.set(dot_previous, square_previous, square, double(grad[t - p.lag]));
  const S own = S((after.pair ? after.own_first : 0) + (before.pair ? before.own_second : 0));
  const S to_next = S(after.cross), to_previous = S(before.cross);
  T* out = static_cast<T*>(p.out) + t * p.x.width;
  for (int64_t column = at.column(); column < p.x.width; column += kLanes) {
    const Vector<T> x = load_vector<T, kAligned>(row, column, p.x.width);
    const Vector<T> y = load_vector<T, kAligned>(next, column, p.x.width);
    const Vector<T> z = load_vector<T, kAligned>(previous, column, p.x.width);
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      S sum = 0;
      if (after.pair || before.pair) sum = own * widen(x.v[i]);
      if (after.pair) sum = sum + to_next * widen(y.v[i]);
      if (before.pair) sum = sum + to_previous * widen(z.v[i]);
      narrow(sum, result.v[i]);
    }
    store_vector<T, kAligned>(out, column, p.x.width, result);
  }
}

}  // namespace fastcompress::cuda
