// Vectors as arrays that the compiler can vectorize: for fp64 on every instruction set, and for all types on the
// portable one.
#pragma once

#include "row_kernels.h"

namespace fastcompress {
namespace {

// Simd<T> loads 32 consecutive elements of T as fp32 vectors (fp64 for double): kHalves calls of load2, two vectors per
// call. The order of elements in the lanes depends on T and the instruction set; only load2, store2 and tree use it.
template <class T>
struct Simd;

// A vector of FASTCOMPRESS_VECTOR_BYTES, which simd_<isa>.h sets.
template <class S>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(FASTCOMPRESS_VECTOR_BYTES)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(FASTCOMPRESS_VECTOR_BYTES)));
};

// Returns `row` where it is greater than `best`, or where it is NaN and `best` is not. So the first of equal maxima is
// kept, and NaN wins.
template <class V>
inline V later_max_generic(V best, V row) {
  return ((row > best) | ((row != row) & (best == best))) ? row : best;
}

template <class T>
struct ArraySimd {
  using S = accumulate_t<T>;
  using V = typename Register<S>::type;
  static constexpr int kWidth = FASTCOMPRESS_VECTOR_BYTES / sizeof(S);
  static constexpr int kHalves = 16 / kWidth;
  static constexpr int kRows = 1;
  static constexpr int kPartners = 1;
  static constexpr int kStrip = kHalves;

  static V set1(S value) { return value - V{}; }  // x - 0 is x in every bit, also for -0
  static V later_max(V best, V row) { return later_max_generic(best, row); }

  static V load(const T* p) {
    V v;
    if constexpr (sizeof(T) == sizeof(S))
      std::memcpy(&v, p, sizeof v);
    else
      for (int i = 0; i < kWidth; ++i) v[i] = widen(p[i]);
    return v;
  }
  static void store(T* p, V v) {
    if constexpr (sizeof(T) == sizeof(S))
      std::memcpy(static_cast<void*>(p), &v, sizeof v);
    else
      for (int i = 0; i < kWidth; ++i) narrow(v[i], p[i]);
  }
  // Half h has the kWidth elements from kWidth * h on in `a`, and those 16 after them in `b`.
  static void load2(const T* p, int h, V& a, V& b) {
    a = load(p + kWidth * h);
    b = load(p + 16 + kWidth * h);
  }
  static void store2(T* p, int h, V a, V b) {
    store(p + kWidth * h, a);
    store(p + 16 + kWidth * h, b);
  }
  static double tree(const V (&sums)[kHalves][2]) {
    double t[16];
    for (int i = 0; i < 16; ++i)
      t[i] = double(sums[i / kWidth][0][i % kWidth]) + double(sums[i / kWidth][1][i % kWidth]);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
  }
};

}  // namespace
}  // namespace fastcompress
