// Cosine distances between rows `lag` apart, and their gradient. One group of lanes (rows.cuh) processes two
// neighbouring rows in the forward pass with lag 1, otherwise one row.
//
// Model, for x [N, D] of E-byte elements: forward reads N D E bytes from device memory and writes 4 N. The partner of
// the last row of a group comes from a cache, so that with lag 1 a group reads 1.5 N D E bytes, otherwise 2 N D E. It
// computes the square of that partner again. With lag 1 a lane executes 54.75 instructions for each row of bf16 and 8
// columns (SASS of sm_90): 12 widenings, 20 multiplications and 20 additions, 1.5 loads. Backward reads a row and its
// two partners per group twice, and writes N D E bytes.
#pragma once

#include "params.h"
#include "score.cuh"
#include "tile.cuh"

namespace fastcompress::cuda {

// Returns whether rows t and t + lag are frames of the same sequence.
__device__ inline bool is_pair(const Sequences& sequences, int64_t t, int64_t lag) {
  if (t < 0) return false;
  const int64_t b = upper_bound(sequences.end, sequences.count, t);
  return b < sequences.count && sequences.begin[b] <= t && lag < sequences.end[b] - t;
}

// Rows that a group processes in the forward pass. With lag 1 they are consecutive, so that it reads only one row more.
constexpr int kDistanceRows = 2;
inline int rows_per_group(int64_t lag) { return lag == 1 ? kDistanceRows : 1; }

// Writes the distances of K rows from t on, whose partners are the K rows after the first of them.
template <class T, bool kAligned, int K>
__device__ __forceinline__ void write_distances(const DistanceParams& p, int64_t t, const GroupLane<kVector<T>>& at) {
  using S = accumulate_t<T>;
  const T* rows[K + 1];
#pragma unroll
  for (int k = 0; k <= K; ++k) {
    // Lanes without a row use row 0, because all lanes of a warp must take part in its shuffles.
    const int64_t row = k == 0 ? t : t + (k - 1) + p.lag;
    rows[k] = static_cast<const T*>(p.x.data) + (row < p.x.count ? row * p.x.stride : 0);
  }
  double dots[K], squares[K + 1];
  score_rows<kAligned, 1>(rows, int(p.x.width), at, dots, squares);
  wait_for_previous_launch();
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (at.lane == k && t + k < p.x.count)
      static_cast<S*>(p.out)[t + k] =
          is_pair(p.sequences, t + k, p.lag) ? S(cosine_distance(dots[k], squares[k], squares[k + 1])) : S(NAN);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) adjacent_distance_fwd_kernel(DistanceParams p) {
  const GroupLane<kVector<T>> at(int(threadIdx.x));
  const int64_t group = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  if (p.lag == 1)
    write_distances<T, kAligned, kDistanceRows>(p, group * kDistanceRows, at);
  else
    write_distances<T, kAligned, 1>(p, group, at);
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
  const GroupLane<kVector<T>> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const int width = int(p.x.width);
  wait_for_previous_launch();
  const bool inside = t < p.x.count;
  const bool has_next = inside && is_pair(p.sequences, t, p.lag);
  const bool has_previous = inside && is_pair(p.sequences, t - p.lag, p.lag);
  const T* row = static_cast<const T*>(p.x.data) + (inside ? t * p.x.stride : 0);
  const T* next = has_next ? row + p.lag * p.x.stride : row;
  const T* previous = has_previous ? row - p.lag * p.x.stride : row;
  double dots[2], squares[3];  // of previous and row, row and next
  score_rows<kAligned, 1>({previous, row, next}, width, at, dots, squares);
  if (!inside) return;
  const S* grad = static_cast<const S*>(p.grad);
  PairSlopes after, before;
  if (has_next) after.set(dots[1], squares[1], squares[2], double(grad[t]));
  if (has_previous) before.set(dots[0], squares[0], squares[1], double(grad[t - p.lag]));
  const S own = S((after.pair ? after.own_first : 0) + (before.pair ? before.own_second : 0));
  const S to_next = S(after.cross), to_previous = S(before.cross);
  T* out = static_cast<T*>(p.out) + t * p.x.width;
  for (int column = at.column(); column < width; column += kLanes) {
    S x[kVector<T>], y[kVector<T>], z[kVector<T>];
    widen_vector<T>(load_vector<T, kAligned>(row, column, width), x);
    widen_vector<T>(load_vector<T, kAligned>(next, column, width), y);
    widen_vector<T>(load_vector<T, kAligned>(previous, column, width), z);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      S sum = 0;
      if (after.pair || before.pair) sum = own * x[i];
      if (after.pair) sum = sum + to_next * y[i];
      if (before.pair) sum = sum + to_previous * z[i];
      x[i] = sum;
    }
    store_vector<T, kAligned>(out, column, width, narrow_vector<T>(x));
  }
}

}  // namespace fastcompress::cuda
