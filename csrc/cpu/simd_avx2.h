// Simd<T> for AVX2: vectors of 8 floats, four for 32 elements.
#pragma once

#include <immintrin.h>

#define FASTCOMPRESS_VECTOR_BYTES 32
#include "simd_array.h"

namespace fastcompress {
namespace {

// Rounds to bf16, to nearest even, in the upper half of each lane; NaN becomes a quiet NaN.
inline __m256i round_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}

inline __m256d low(__m256 a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
inline __m256d high(__m256 a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
inline __m128d halve(__m256d a) { return _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1)); }

struct Avx2Simd {
  using S = float;
  using V = __m256;
  static constexpr int kHalves = 2;
  static constexpr int kRows = 1;
  static constexpr int kPartners = 3;  // sums, a row and a partner take all 16 registers
  static constexpr int kStrip = 4;

  static V set1(float value) { return _mm256_set1_ps(value); }
  // See later_max_generic in simd_array.h.
  static V later_max(V best, V row) {
    const __m256 replace = _mm256_and_ps(_mm256_cmp_ps(row, best, _CMP_NLE_UQ), _mm256_cmp_ps(best, best, _CMP_ORD_Q));
    return _mm256_blendv_ps(best, row, replace);
  }
  // Half h has the elements 8h .. 8h + 7 and 16 + 8h .. 16 + 8h + 7.
  static double tree(const V (&sums)[2][2]) {
    __m256d eight[2];  // sums 0..7 in two registers, after adding sums j + 16 and j + 8 to sum j
    eight[0] =
        _mm256_add_pd(_mm256_add_pd(low(sums[0][0]), low(sums[0][1])), _mm256_add_pd(low(sums[1][0]), low(sums[1][1])));
    eight[1] = _mm256_add_pd(_mm256_add_pd(high(sums[0][0]), high(sums[0][1])),
                             _mm256_add_pd(high(sums[1][0]), high(sums[1][1])));
    const __m128d two = halve(_mm256_add_pd(eight[0], eight[1]));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

template <>
struct Simd<float> : Avx2Simd {
  static void load2(const float* p, int h, V& a, V& b) {
    a = _mm256_loadu_ps(p + 8 * h);
    b = _mm256_loadu_ps(p + 16 + 8 * h);
  }
  static void store2(float* p, int h, V a, V b) {
    _mm256_storeu_ps(p + 8 * h, a);
    _mm256_storeu_ps(p + 16 + 8 * h, b);
  }
};

template <>
struct Simd<Half> : Avx2Simd {
  static void load2(const Half* p, int h, V& a, V& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * h)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 + 8 * h)));
  }
  static void store2(Half* p, int h, V a, V b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * h), _mm256_cvtps_ph(a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 + 8 * h), _mm256_cvtps_ph(b, kNearest));
  }
};

// A 32-bit lane holds two elements, so one vector takes the even and the other the odd elements; half h has the
// elements 16h .. 16h + 15.
template <>
struct Simd<BFloat16> : Avx2Simd {
  static void load2(const BFloat16* p, int h, V& even, V& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * h));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000)));
  }
  static void store2(BFloat16* p, int h, V even, V odd) {
    const __m256i upper = _mm256_and_si256(round_bf16(odd), _mm256_set1_epi32(0xffff0000));
    const __m256i bits = _mm256_or_si256(_mm256_srli_epi32(round_bf16(even), 16), upper);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * h), bits);
  }
  static double tree(const V (&sums)[2][2]) {
    __m128d two[2];  // elements 0, 2 and 1, 3
    for (int odd = 0; odd < 2; ++odd) {
      const __m256d first = _mm256_add_pd(low(sums[0][odd]), low(sums[1][odd]));     // 0 2 4 6
      const __m256d second = _mm256_add_pd(high(sums[0][odd]), high(sums[1][odd]));  // 8 10 12 14
      two[odd] = halve(_mm256_add_pd(first, second));
    }
    const __m128d last = _mm_add_pd(_mm_unpacklo_pd(two[0], two[1]), _mm_unpackhi_pd(two[0], two[1]));
    return _mm_cvtsd_f64(_mm_add_sd(last, _mm_unpackhi_pd(last, last)));
  }
};

template <>
struct Simd<double> : ArraySimd<double> {};

}  // namespace
}  // namespace fastcompress
