// Reductions of a segment and the order of its sum, defined in fastcompress/reference/segment_reduce.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastcompress {

enum class Reduce : int32_t { kMean, kSum, kMax, kFirst, kLast, kMiddle };

// Frames per block of a segment's sum: each block is added in frame order, then the blocks in order.
constexpr int64_t kBlock = 64;

FASTCOMPRESS_HD constexpr bool picks_a_row(Reduce reduce) {
  return reduce == Reduce::kFirst || reduce == Reduce::kLast || reduce == Reduce::kMiddle;
}

// Returns the row that `first`, `last` and `middle` pick from a segment of at least one row.
FASTCOMPRESS_HD constexpr int64_t picked_row(int64_t start, int64_t length, Reduce reduce) {
  if (reduce == Reduce::kFirst) return start;
  return start + (reduce == Reduce::kLast ? length - 1 : (length - 1) / 2);
}

namespace {  // internal linkage: each file has a copy for its own instruction set

// Returns the sum of the weights of a segment of at least one row, in the order in which its rows are added.
template <class S>
FASTCOMPRESS_HD S sum_of_weights(const S* weights, int64_t count) {
  S total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = first + kBlock > count ? count : first + kBlock;
    S block = weights[first];
    for (int64_t i = first + 1; i < last; ++i) block = block + weights[i];
    total = first == 0 ? block : total + block;
  }
  return total;
}

}  // namespace

}  // namespace fastcompress
