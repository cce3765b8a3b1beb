// Cosine distances between each row and the next `window` rows. One group of lanes (rows.cuh) multiplies one row with
// kLags later rows at once; a second kernel, with one thread per distance, divides by the norms.
//
// Model, for x [N, D] of E-byte elements and a window of W: x is read once from device memory, and 8 times per kLags
// lags from the first-level cache, where the rows of a thread block fit. A lane executes 205 instructions for 8 columns
// of bf16 and 7 lags (SASS of sm_90), 25.6 per element: 64 multiplications and additions each, 58 conversions, 8 loads.
// That is 1.5 times the budget of 92 % of copy bandwidth at 75 % issue. The dot products are 8 N (W + 1) bytes, written
// and read.
#pragma once

#include "adjacent_distance.cuh"

namespace fastcompress::cuda {

constexpr int kLags = 7;  // the window of minimum-variance segments of up to 8 rows

// blockIdx.y selects the lags kLags * blockIdx.y + 1 and later ones. dots [N, lags + 1]: column 0 is the square of the
// row.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) band_dots_kernel(BandParams p) {
  using S = accumulate_t<T>;
  constexpr int N = kVector<T>;
  const GroupLane<N> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const int64_t first_lag = int64_t(blockIdx.y) * kLags + 1;
  const T* rows[kLags + 1];
#pragma unroll
  for (int i = 0; i <= kLags; ++i) {
    // Row 0 takes the place of a row that does not exist, because all lanes of a warp must take part in its shuffles.
    const int64_t row = i == 0 ? t : t + first_lag + i - 1;
    rows[i] = static_cast<const T*>(p.x.data) + (row < p.x.count ? row * p.x.stride : 0);
  }
  S square[N] = {}, dots[kLags][N] = {};
  for_each_step<T, kAligned, N>(rows, int(p.x.width), at.column(), [&](const Vector<T, N>(&vectors)[kLags + 1]) {
    S first[N], other[N];
    widen_vector<T>(vectors[0], first);
    multiply_add<T>(first, first, square);
#pragma unroll
    for (int i = 0; i < kLags; ++i) {
      widen_vector<T>(vectors[i + 1], other);
      multiply_add<T>(first, other, dots[i]);
    }
  });
  double* out = p.dots + t * (p.lags + 1);
  const bool writes = at.lane == 0 && t < p.x.count;
  const double total = add_partial_sums<at.kGroup>(square, at.lane);
  if (writes && first_lag == 1) out[0] = total;
#pragma unroll
  for (int i = 0; i < kLags; ++i) {
    const double dot = add_partial_sums<at.kGroup>(dots[i], at.lane);
    if (writes && first_lag + i <= p.lags) out[first_lag + i] = dot;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) band_distances_kernel(BandParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.x.count * p.window) return;
  const int64_t t = i / p.window, lag = i % p.window + 1;
  S distance = S(NAN);
  if (is_pair(p.sequences, t, lag)) {
    const double* dots = p.dots + t * (p.lags + 1);
    distance = S(cosine_distance(dots[lag], dots[0], dots[lag * (p.lags + 1)]));
  }
  static_cast<S*>(p.out)[i] = distance;
}

}  // namespace fastcompress::cuda
