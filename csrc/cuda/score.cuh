// Dot products of neighbouring rows and squares of rows, with one group of lanes for a few rows.
//
// A group that scores K pairs of consecutive rows reads K + 1 rows and widens each once. For each step of 32 columns, a
// lane executes per pair of elements: (K + 1) / K widenings of a half type, 2 multiplications and 2 additions (fp16: 2
// fused), and its share of K + 1 loads.
#pragma once

#include "rows.cuh"

namespace fastcompress::cuda {

// Computes dots[k] = rows[k] . rows[k + 1] and squares[k] = rows[k] . rows[k]; with kLast = 1 also the square of the
// last row. All lanes of a warp must call this, each group with its own rows.
template <bool kAligned, int kLast, class T, int N, int K>
__device__ __forceinline__ void score_rows(const T* const (&rows)[K + 1], int width, const GroupLane<N>& at,
                                           double (&dots)[K], double (&squares)[K + kLast]) {
  using S = accumulate_t<T>;
  S dot[K][N] = {}, square[K + kLast][N] = {};
  for_each_step<T, kAligned, N>(rows, width, at.column(), [&](const Vector<T, N>(&vectors)[K + 1]) {
    S wide[K + 1][N];
#pragma unroll
    for (int k = 0; k <= K; ++k) {
      widen_vector<T>(vectors[k], wide[k]);
      if (k < K + kLast) multiply_add<T>(wide[k], wide[k], square[k]);
      if (k > 0) multiply_add<T>(wide[k - 1], wide[k], dot[k - 1]);
    }
  });
#pragma unroll
  for (int k = 0; k < K; ++k) dots[k] = add_partial_sums<kLanes / N>(dot[k], at.lane);
#pragma unroll
  for (int k = 0; k < K + kLast; ++k) squares[k] = add_partial_sums<kLanes / N>(square[k], at.lane);
}

}  // namespace fastcompress::cuda
