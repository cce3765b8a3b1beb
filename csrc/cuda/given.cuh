// What the kernels over given segments share: which segment and columns a thread takes, and rows of a matrix.
#pragma once

#include "params.h"
#include "rows.cuh"
#include "sum.cuh"

namespace fastcompress::cuda {

struct Segment {
  int64_t start, length;
};

// Blocks that should fit in a multiprocessor at once: without a say the compiler spills a register to fit in more.
constexpr int kResidentBlocks = 6;

// Where segment m says that it ends; whatever it says, without overflow.
__device__ inline int64_t segment_end(const SegmentsIn& segments, int64_t m) {
  return int64_t(uint64_t(segments.starts[m]) + uint64_t(segments.lengths[m]));
}

// Segment m; empty, and the error noted, if it is out of order or leaves the rows. It may share `shared` rows with the
// one before, and then has as many.
__device__ inline Segment read_segment(const SegmentsIn& segments, int64_t m, int64_t shared = 0) {
  const int64_t start = segments.starts[m], length = segments.lengths[m];
  const int64_t earliest = m == 0 ? 0 : int64_t(uint64_t(segment_end(segments, m - 1)) - uint64_t(shared));
  if (length >= shared && start >= earliest && start >= 0 && start <= segments.rows && length <= segments.rows - start)
    return {start, length};
  if (segments.error != nullptr) atomicOr(segments.error, int32_t(kInvalidSegments));
  return {0, 0};
}

// What a thread works on.
struct SegmentThread {
  int64_t m, vector;
  __device__ SegmentThread()
      : m(int64_t(blockIdx.x) * kSegmentsPerBlock + threadIdx.x / 32),
        vector(int64_t(blockIdx.y) * 32 + threadIdx.x % 32) {}
  template <class T>
  __device__ int64_t column() const {
    return vector * kVector<T>;
  }
};

inline unsigned blocks_of(int64_t segments) { return unsigned((segments + kSegmentsPerBlock - 1) / kSegmentsPerBlock); }

// A warp for each segment and 32 vectors of its columns.
template <class T>
dim3 segments_grid(int64_t segments, int64_t width) {
  constexpr int64_t kColumns = 32 * kVector<T>;
  return dim3(blocks_of(segments), unsigned((width + kColumns - 1) / kColumns));
}

template <class T>
__device__ __forceinline__ const T* row_of(const RowsIn& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

template <class T>
__device__ __forceinline__ Vector<T> zero_vector() {
  Vector<T> out;
  memset(&out, 0, sizeof out);
  return out;
}

}  // namespace fastcompress::cuda
