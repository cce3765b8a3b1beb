// Shared by the kernels over given segments: checked segments, the segment and columns of each thread, rows of a
// matrix.
#pragma once

#include "params.h"
#include "rows.cuh"
#include "sum.cuh"

namespace fastcompress::cuda {

struct Segment {
  int64_t start, length;
};

// Resident blocks per multiprocessor to compile for: without this bound the compiler spills a register to fit more.
constexpr int kResidentBlocks = 6;

// Returns the end of segment m, without signed overflow for any input.
__device__ inline int64_t segment_end(const SegmentsIn& segments, int64_t m) {
  return int64_t(uint64_t(segments.starts[m]) + uint64_t(segments.lengths[m]));
}

// Returns segment m. If it is out of order or outside of the rows, returns an empty segment and sets the error flag. A
// segment may share `shared` rows with the previous one, and must have at least that many.
__device__ inline Segment read_segment(const SegmentsIn& segments, int64_t m, int64_t shared = 0) {
  const int64_t start = segments.starts[m], length = segments.lengths[m];
  const int64_t earliest = m == 0 ? 0 : int64_t(uint64_t(segment_end(segments, m - 1)) - uint64_t(shared));
  if (length >= shared && start >= earliest && start >= 0 && start <= segments.rows && length <= segments.rows - start)
    return {start, length};
  if (segments.error != nullptr) atomicOr(segments.error, int32_t(kInvalidSegments));
  return {0, 0};
}

// The segment and the vector of 16 bytes within its rows that a thread processes: one warp per segment.
struct SegmentThread {
  int64_t m;
  int vector;
  __device__ SegmentThread()
      : m(int64_t(blockIdx.x) * kSegmentsPerBlock + threadIdx.x / 32), vector(blockIdx.y * 32 + threadIdx.x % 32) {}
  template <class T>
  __device__ int column() const {
    return vector * kVector<T>;
  }
};

inline unsigned blocks_of(int64_t segments) { return unsigned((segments + kSegmentsPerBlock - 1) / kSegmentsPerBlock); }

// A grid with one warp for each segment and each 32 vectors of its columns.
template <class T>
dim3 segments_grid(int64_t segments, int64_t width) {
  constexpr int64_t kColumns = 32 * kVector<T>;
  return dim3(blocks_of(segments), unsigned((width + kColumns - 1) / kColumns));
}

template <class T>
__device__ __forceinline__ const T* row_of(const RowsIn& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

}  // namespace fastcompress::cuda
