// Cosine distance from canonical dot products, defined in fastcompress/reference/adjacent_distance.py.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastcompress {

// Number of partial sums of the canonical dot product. Partial sum j takes the elements i = j (mod kLanes) in
// increasing i, with product and sum rounded separately. A binary tree then adds the partial sums in fp64: sum j and
// sum j + 16, then j + 8, and so on.
constexpr int kLanes = 32;

constexpr double kDistanceEps = 1e-8;

FASTCOMPRESS_HD inline double clamped_norm(double square) {
  const double norm = sqrt(square);
  return norm < kDistanceEps ? kDistanceEps : norm;  // NaN stays NaN
}

FASTCOMPRESS_HD inline double cosine_distance(double dot, double square_a, double square_b) {
  if (square_a == 0 && square_b == 0) return 0;  // two zero rows are equal by definition
  return 1 - dot / (clamped_norm(square_a) * clamped_norm(square_b));
}

}  // namespace fastcompress
