// From canonical dot products to the cosine distance. The definition is fastcompress/reference/adjacent_distance.py.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastcompress {

// Partial sums of the canonical dot product: partial sum j takes the elements i = j (mod kLanes) in increasing i,
// product and sum rounded apart; the sums are then added in fp64, halving.
constexpr int kLanes = 32;

constexpr double kDistanceEps = 1e-8;

FASTCOMPRESS_HD inline double clamped_norm(double square) {
  const double norm = sqrt(square);
  return norm < kDistanceEps ? kDistanceEps : norm;  // NaN stays
}

FASTCOMPRESS_HD inline double cosine_distance(double dot, double square_a, double square_b) {
  if (square_a == 0 && square_b == 0) return 0;  // two zero rows are alike
  return 1 - dot / (clamped_norm(square_a) * clamped_norm(square_b));
}

}  // namespace fastcompress
