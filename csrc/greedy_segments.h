// From dot products to whether a frame joins a segment. The definition is fastcompress/reference/greedy_segments.py.
#pragma once

#include <cstdint>

#include "cosine.h"

namespace fastcompress {

struct Linkage {
  double least;     // mean cosine of a frame that joins
  int64_t max_len;  // of a segment; 0: any

  // `dot`: of the frame and the sum of the segment's `length` unit frames. False for NaN.
  FASTCOMPRESS_HD bool joins(double dot, double inverse_norm, int64_t length) const {
    return dot * inverse_norm >= least * double(length) && (max_len == 0 || length < max_len);
  }
};

// Columns of a row, filled up to whole steps of the canonical dot product.
FASTCOMPRESS_HD inline int64_t padded_width(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

FASTCOMPRESS_HD inline double inverse_norm(double square) { return 1 / clamped_norm(square); }

}  // namespace fastcompress
