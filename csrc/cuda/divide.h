// Division by the number of frames of a segment, rounded like the IEEE 754 division, for many numerators and one
// divisor. The host tests it against the division (tests/csrc/test_divide.py).
//
// With r = 1 / n rounded, q0 = x r and q1 = q0 + (x - n q0) r, where both fused operations round once:
// * Let u be the spacing of floats at x / n. q0 is within 2 u of x / n, since r and the product are each off by at most
//   half a unit in the last place. The residual x - n q0 is a multiple of u / 2 and at most 2 n u, so it is exact for
//   n <= 2^20.
// * q0 + (x - n q0) r, before its rounding, is within 2 u 2^-24 = u 2^-23 of x / n, by the error of r.
// * If x / n is a normal number, its distance from the nearest midpoint of two floats is at least u / (2 n) >= u 2^-21,
//   because x is a multiple of u and no midpoint times n has only 24 bits. So q1 is on the same side of each midpoint
//   as x / n, and rounds like it.
// This fails if x / n is subnormal and not zero, where x / n can be a midpoint, and for infinite x, whose residual is
// NaN. For these vectors, and for longer segments, the division itself runs. The residual is computed with the opposite
// sign, so that a zero keeps its sign.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../dtype.h"
#include "device.h"

namespace fastcompress::cuda {

constexpr int64_t kMaxReciprocal = int64_t(1) << 20;

// A number of frames, and its reciprocal if the division may use it; otherwise 0.
template <class S>
struct Frames {
  S count, reciprocal;

  Frames() = default;
  __device__ explicit Frames(int64_t frames)
      : count(S(frames)), reciprocal(std::is_same_v<S, float> && frames <= kMaxReciprocal ? S(1) / S(frames) : S(0)) {}
};

// Divides N sums of elements of type T by the number of frames.
template <class T, int N>
__device__ __forceinline__ void divide(accumulate_t<T> (&x)[N], const Frames<accumulate_t<T>>& frames) {
  using S = accumulate_t<T>;
  S quotient[N];
  bool safe = false;
  if constexpr (std::is_same_v<S, float>) {
    float residuals = 0;
    // Twice the bits of |x|, minus 1: zero becomes the largest number, and the order of the others remains.
    uint32_t least = ~0u;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float q0 = x[i] * frames.reciprocal, residual = fused_multiply_add(frames.count, q0, -x[i]);
      residuals = i == 0 ? residual : residuals + residual;
      quotient[i] = fused_multiply_add(-residual, frames.reciprocal, q0);
      const uint32_t bits = 2 * float_bits(x[i]) - 1;
      if (bits < least) least = bits;
    }
    // Sums of fp16 numbers are multiples of 2^-24, so their quotients are not subnormal. The sum of the residuals is
    // NaN if one of them is.
    safe = frames.reciprocal != 0 && residuals == residuals &&
           (std::is_same_v<T, Half> || least >= 2 * float_bits(frames.count * 0x1p-126f) - 1);
  }
  if (!safe)
#pragma unroll
    for (int i = 0; i < N; ++i) quotient[i] = x[i] / frames.count;
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = quotient[i];
}

}  // namespace fastcompress::cuda
