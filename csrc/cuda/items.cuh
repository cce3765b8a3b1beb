// Distributes the vectors of a few rows over the threads of a block.
#pragma once

#include "tile.cuh"

namespace fastcompress::cuda {

// Calls f(row, vector) for every vector < `vectors` of every row < `rows`; neighbouring threads take neighbouring
// vectors. Each thread divides once, not once per vector.
template <class F>
__device__ __forceinline__ void for_each_vector(int rows, int vectors, int thread, const F& f) {
  if (vectors == 0) return;
  const int row_step = kThreads / vectors, vector_step = kThreads % vectors;
  int row = thread / vectors, vector = thread % vectors;
  while (row < rows) {
    f(row, vector);
    row += row_step;
    vector += vector_step;
    if (vector >= vectors) {
      vector -= vectors;
      ++row;
    }
  }
}

}  // namespace fastcompress::cuda
