// Cosine distances between each row and the next `window` rows. One group of lanes (rows.cuh) multiplies one row with
// kLags later rows at once; a second kernel, with one thread per distance, divides by the norms.
//
// Model, for x [N, D] of E-byte elements and a window of W: x is read once from device memory, and 1 + W times from the
// first-level cache, where the rows of a thread block fit. Each step of 8 bf16 elements and 7 lags takes 8 loads, 64
// conversions and 2 x 64 multiplications and additions: 25 instructions per element, 1.5 times the budget of 92 % of
// copy bandwidth (docs/kernels.md). The dot products are 8 N (W + 1) bytes, written and read.
#pragma once

#include "adjacent_distance.cuh"

namespace fastcompress::cuda {

constexpr int kLags = 7;  // the window of minimum-variance segments of up to 8 rows

// blockIdx.y selects the lags kLags * blockIdx.y + 1 and later ones. dots [N, lags + 1]: column 0 is the square of the
// row.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) band_dots_kernel(BandParams p) {
  using S = accumulate_t<T>;
  const GroupLane<T> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const bool inside = t < p.x.count;
  const int64_t first_lag = int64_t(blockIdx.y) * kLags + 1;
  const T* row = static_cast<const T*>(p.x.data) + (inside ? t * p.x.stride : 0);
  const T* later[kLags];
#pragma unroll
  for (int i = 0; i < kLags; ++i)  // a row without this partner is multiplied with itself
    later[i] =
        inside && first_lag + i <= p.lags && t + first_lag + i < p.x.count ? row + (first_lag + i) * p.x.stride : row;
  S squares[kVector<T>] = {}, sums[kLags][kVector<T>] = {};
  for (int64_t column = at.column(); column - column % kLanes < p.x.width; column += kLanes) {
    const Vector<T> a = load_vector<T, kAligned>(row, column, p.x.width);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) squares[i] = multiply_add<T>(widen(a.v[i]), widen(a.v[i]), squares[i]);
#pragma unroll
    for (int lag = 0; lag < kLags; ++lag) {
      if (first_lag + lag > p.lags) continue;
      const Vector<T> b = load_vector<T, kAligned>(later[lag], column, p.x.width);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sums[lag][i] = multiply_add<T>(widen(a.v[i]), widen(b.v[i]), sums[lag][i]);
    }
  }
  double* out = p.dots + t * (p.lags + 1);
  const double square = add_partial_sums<T>(squares);
  if (inside && at.lane == 0 && first_lag == 1) out[0] = square;
#pragma unroll
  for (int lag = 0; lag < kLags; ++lag) {
    if (first_lag + lag > p.lags) continue;
    const double dot = add_partial_sums<T>(sums[lag]);
    if (inside && at.lane == 0) out[first_lag + lag] = dot;
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
