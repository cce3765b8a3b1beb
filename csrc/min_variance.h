// Constants of minimum-variance segments, defined in fastcompress/reference/min_variance.py.
#pragma once

#include <cstdint>

namespace fastcompress {

constexpr int64_t kVarianceBlock = 1500;    // rows per block; MIN_VARIANCE_BLOCK of fastcompress/rules.py
constexpr double kLargestDistance = 1e100;  // a distance beyond it counts as 1, so that no sum overflows

}  // namespace fastcompress
