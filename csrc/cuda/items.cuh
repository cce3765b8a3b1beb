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

// Starts to copy rows of `vectors` > 0 vectors to shared memory; pitch and stride are the bytes between rows there and
// in global memory. Like for_each_vector, but with addresses that only grow: 21 instructions per vector (SASS of
// sm_90), three of which the assembler adds and which have no effect.
__device__ __forceinline__ void copy_rows(SharedAddress to, int pitch, const void* from, int64_t stride, int rows,
                                          int vectors, int thread) {
  const int row_step = kThreads / vectors, vector_step = kThreads % vectors;
  int row = thread / vectors, vector = thread % vectors;
  const char* source = static_cast<const char*>(from) + row * stride + vector * 16;
  SharedAddress target = to + row * pitch + vector * 16;
  while (row < rows) {
    copy_async(target, source);
    row += row_step;
    vector += vector_step;
    source += row_step * stride + vector_step * 16;
    target += row_step * pitch + vector_step * 16;
    if (vector >= vectors) {
      vector -= vectors;
      ++row;
      source += stride - vectors * 16;
      target += pitch - vectors * 16;
    }
  }
}

}  // namespace fastcompress::cuda
