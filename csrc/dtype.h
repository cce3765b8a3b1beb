// Half-precision types as bits, with portable conversions. This header includes neither torch nor inline functions of
// the standard library, so that files compiled for one instruction set can include it.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastcompress {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace {

FASTCOMPRESS_HD inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
FASTCOMPRESS_HD inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTCOMPRESS_HD inline float widen(float value) { return value; }
FASTCOMPRESS_HD inline double widen(double value) { return value; }
FASTCOMPRESS_HD inline float widen(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
FASTCOMPRESS_HD inline float widen(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude >= 0x0400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));      // normal
  const float subnormal = float(magnitude) * 0x1p-24f;                                        // exact
  return bits_float(sign | float_bits(subnormal));
#endif
}

// narrow rounds to nearest, ties to even; NaN stays NaN.
FASTCOMPRESS_HD inline void narrow(float value, float& out) { out = value; }
FASTCOMPRESS_HD inline void narrow(double value, double& out) { out = value; }
FASTCOMPRESS_HD inline void narrow(float value, BFloat16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  out.bits = value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
FASTCOMPRESS_HD inline void narrow(float value, Half& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) {
    out.bits = uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (magnitude >= 0x38800000) {  // at least 2^-14: a normal half, or an overflow
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    out.bits = uint16_t(sign | (rounded >= 0x47800000 ? 0x7c00 : (rounded - (112u << 23)) >> 13));
  } else {  // the sum with 0.5 has the spacing of subnormal halves, 2^-24, so that it rounds correctly
    out.bits = uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  }
#endif
}

}  // namespace

// The type in which distances and sums of T are computed.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace fastcompress
