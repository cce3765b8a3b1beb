// The sum of a segment in its defined order: blocks of kBlock frames, the blocks added in order (segment_reduce.h).
#pragma once

#include "../segment_reduce.h"
#include "rows.cuh"

namespace fastcompress::cuda {

// Computes the sum of `count` >= 1 rows at one vector of columns. `load(i, row)` loads row i; `join(a, b)` returns the
// sum, or maximum, of a and b.
template <class T, class Load, class Join>
__device__ __forceinline__ void ordered_sum(int64_t count, const Load& load, const Join& join,
                                            accumulate_t<T> (&total)[kVector<T>]) {
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = first + kBlock < count ? first + kBlock : count;
    accumulate_t<T> block[kVector<T>], row[kVector<T>];
    load(first, block);
    for (int64_t i = first + 1; i < last; ++i) {
      load(i, row);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) block[k] = join(block[k], row[k]);
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) total[k] = first == 0 ? block[k] : join(total[k], block[k]);
  }
}

template <class T>
__device__ __forceinline__ void widen_vector(const Vector<T>& vector, accumulate_t<T> (&out)[kVector<T>]) {
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) out[k] = widen(vector.v[k]);
}

template <class T>
__device__ __forceinline__ Vector<T> narrow_vector(const accumulate_t<T> (&values)[kVector<T>]) {
  Vector<T> out;
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) narrow(values[k], out.v[k]);
  return out;
}

template <class S>
struct Add {
  __device__ S operator()(S a, S b) const { return a + b; }
};

}  // namespace fastcompress::cuda
