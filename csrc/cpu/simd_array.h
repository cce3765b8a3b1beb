// Vectors as arrays that the compiler may vectorize: fp64 on every instruction set, and every type on the portable one.
#pragma once

#include "row_kernels.h"

namespace fastcompress {
namespace {

// How 32 consecutive elements of T become fp32 (fp64) vectors: kHalves calls of load2, two vectors each. Which element
// lands in which lane is the type's own affair; store2 and tree know it.
template <class T>
struct Simd;

template <class S>
struct ArrayVector {
  S v[16];

  static ArrayVector set1(S value) {
    ArrayVector r;
    for (S& e : r.v) e = value;
    return r;
  }
};

template <class S>
ArrayVector<S> operator+(const ArrayVector<S>& a, const ArrayVector<S>& b) {
  ArrayVector<S> r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
template <class S>
ArrayVector<S> operator*(const ArrayVector<S>& a, const ArrayVector<S>& b) {
  ArrayVector<S> r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b.v[i];
  return r;
}
template <class S>
ArrayVector<S> operator/(const ArrayVector<S>& a, const ArrayVector<S>& b) {
  ArrayVector<S> r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] / b.v[i];
  return r;
}
// `row` where it is greater than `best`, or NaN where `best` is not: the first maximum stays, NaN wins.
template <class S>
ArrayVector<S> later_max(const ArrayVector<S>& best, const ArrayVector<S>& row) {
  ArrayVector<S> r;
  for (int i = 0; i < 16; ++i) {
    const bool replace = row.v[i] > best.v[i] || (row.v[i] != row.v[i] && best.v[i] == best.v[i]);
    r.v[i] = replace ? row.v[i] : best.v[i];
  }
  return r;
}

template <class T>
struct ArraySimd {
  using S = accumulate_t<T>;
  using V = ArrayVector<S>;
  static constexpr int kHalves = 1;
  static constexpr int kRows = 1;
  static constexpr int kStrip = 1;

  static V set1(S value) { return V::set1(value); }
  static void load2(const T* p, int, V& a, V& b) {
    for (int i = 0; i < 16; ++i) a.v[i] = widen(p[i]);
    for (int i = 0; i < 16; ++i) b.v[i] = widen(p[16 + i]);
  }
  static void store2(T* p, int, const V& a, const V& b) {
    for (int i = 0; i < 16; ++i) narrow(a.v[i], p[i]);
    for (int i = 0; i < 16; ++i) narrow(b.v[i], p[16 + i]);
  }
  static double tree(const V (&sums)[1][2]) {
    double t[16];
    for (int i = 0; i < 16; ++i) t[i] = double(sums[0][0].v[i]) + double(sums[0][1].v[i]);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
  }
};

}  // namespace
}  // namespace fastcompress
