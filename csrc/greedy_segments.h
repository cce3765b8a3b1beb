// Decides from a dot product whether a frame joins the current segment. Defined in
// fastcompress/reference/greedy_segments.py.
#pragma once

#include <cstdint>

#include "cosine.h"

namespace fastcompress {

struct Linkage {
  double least;     // least mean cosine to the segment's frames with which a frame joins
  int64_t max_len;  // longest segment; 0: no maximum

  // `dot` is the dot product of the frame with the sum of the segment's `length` unit-norm frames. False for NaN.
  FASTCOMPRESS_HD bool joins(double dot, double inverse_norm, int64_t length) const {
    return dot * inverse_norm >= least * double(length) && (max_len == 0 || length < max_len);
  }
};

// Width of a row, rounded up to whole steps of the canonical dot product.
FASTCOMPRESS_HD inline int64_t padded_width(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

FASTCOMPRESS_HD inline double inverse_norm(double square) { return 1 / clamped_norm(square); }

}  // namespace fastcompress
