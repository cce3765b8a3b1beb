// Simd<T> for AVX-512: vectors of 16 floats, two for 32 elements.
#pragma once

#include <immintrin.h>

#define FASTCOMPRESS_VECTOR_BYTES 64
#include "simd_array.h"

namespace fastcompress {
namespace {

// Rounds to bf16, to nearest even, in the upper half of each lane; NaN becomes a quiet NaN.
inline __m512i round_bf16(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

// Adds 8 sums as in the canonical tree: sum j + 4 to sum j, then j + 2, then j + 1.
inline double tree8(__m512d sums) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(sums), _mm512_extractf64x4_pd(sums, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline __m512d low(__m512 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
inline __m512d high(__m512 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }

struct Avx512Simd {
  using S = float;
  using V = __m512;
  static constexpr int kHalves = 1;
  static constexpr int kRows = 4;
  static constexpr int kPartners = 8;
  static constexpr int kStrip = 4;

  static V set1(float value) { return _mm512_set1_ps(value); }
  // See later_max_generic in simd_array.h.
  static V later_max(V best, V row) {
    const __mmask16 replace = _mm512_cmp_ps_mask(row, best, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(best, best, _CMP_ORD_Q);
    return _mm512_mask_mov_ps(best, replace, row);
  }
  // The two vectors have the elements 0 .. 15 and 16 .. 31.
  static double tree(const V (&sums)[1][2]) {
    const __m512d first = _mm512_add_pd(low(sums[0][0]), low(sums[0][1]));
    const __m512d second = _mm512_add_pd(high(sums[0][0]), high(sums[0][1]));
    return tree8(_mm512_add_pd(first, second));
  }
};

template <>
struct Simd<float> : Avx512Simd {
  // fp32 reads fewer rows at once than the half types, which compute more per byte. The fused op on 11,333 x 1280 took
  // 1.07 to 1.2 times the bandwidth bound with 1 or 2 rows, and 1.39 to 1.45 times with 4 (AMD EPYC 9004, one thread).
  static constexpr int kRows = 2;

  static void load2(const float* p, int, V& a, V& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  static void store2(float* p, int, V a, V b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }
};

template <>
struct Simd<Half> : Avx512Simd {
  static void load2(const Half* p, int, V& a, V& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  static void store2(Half* p, int, V a, V b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, kNearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, kNearest));
  }
};

// A 32-bit lane holds two elements, so one vector takes the even and the other the odd elements: this needs a shift and
// a mask, and no shuffle.
template <>
struct Simd<BFloat16> : Avx512Simd {
  static void load2(const BFloat16* p, int, V& even, V& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
  }
  static void store2(BFloat16* p, int, V even, V odd) {
    const __m512i upper = _mm512_and_si512(round_bf16(odd), _mm512_set1_epi32(0xffff0000));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(round_bf16(even), 16), upper));
  }
  static double tree(const V (&sums)[1][2]) {
    const __m512d even = _mm512_add_pd(low(sums[0][0]), high(sums[0][0]));  // elements 0, 2, .. 14
    const __m512d odd = _mm512_add_pd(low(sums[0][1]), high(sums[0][1]));
    const __m256d even4 = _mm256_add_pd(_mm512_castpd512_pd256(even), _mm512_extractf64x4_pd(even, 1));  // 0 2 4 6
    const __m256d odd4 = _mm256_add_pd(_mm512_castpd512_pd256(odd), _mm512_extractf64x4_pd(odd, 1));
    const __m128d even2 = _mm_add_pd(_mm256_castpd256_pd128(even4), _mm256_extractf128_pd(even4, 1));  // 0 2
    const __m128d odd2 = _mm_add_pd(_mm256_castpd256_pd128(odd4), _mm256_extractf128_pd(odd4, 1));
    const __m128d last = _mm_add_pd(_mm_unpacklo_pd(even2, odd2), _mm_unpackhi_pd(even2, odd2));  // 0 1
    return _mm_cvtsd_f64(_mm_add_sd(last, _mm_unpackhi_pd(last, last)));
  }
};

template <>
struct Simd<double> : ArraySimd<double> {};

}  // namespace
}  // namespace fastcompress
