// Cosine distances between consecutive rows, used by adjacent_distance and segment_pool.
#pragma once

#include <algorithm>

#include "cosine.h"
#include "row_kernels.h"

namespace fastcompress {

// Writes the distance between rows i and i + 1 to d[i * d_stride], for i < rows - 1. Row i starts at x + i * stride.
template <class T>
void score(const T* x, int64_t stride, int64_t rows, int64_t width, accumulate_t<T>* d, int64_t d_stride) {
  constexpr int64_t kPairs = 64;
  double dots[kPairs], squares[kPairs + 1];
  for (int64_t i = 0; i + 1 < rows; i += kPairs) {
    const int64_t pairs = std::min(kPairs, rows - 1 - i);
    row_kernels<T>().dots(x + i * stride, stride, pairs + 1, width, dots, squares);
    for (int64_t j = 0; j < pairs; ++j)
      d[(i + j) * d_stride] = accumulate_t<T>(cosine_distance(dots[j], squares[j], squares[j + 1]));
  }
}

}  // namespace fastcompress
