// Rows of a matrix as vectors of 16 bytes, and the canonical dot product of two rows by a group of lanes.
//
// Partial sum j of the canonical dot product takes the elements i = j (mod 32) in increasing i (cosine.h). A group of
// 32 / kVector lanes therefore processes one row: lane l keeps the kVector partial sums from l * kVector on and reads
// 16 bytes in each step of 32 elements. A warp processes 8 rows of a half type, 4 of fp32 or 2 of fp64 at once, and
// reads whole sectors of 32 bytes.
#pragma once

#include <cstring>
#include <type_traits>

#include "../cosine.h"
#include "../dtype.h"
#include "device.h"

namespace fastcompress::cuda {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));
template <class T>
constexpr int kGroupLanes = kLanes / kVector<T>;

template <class T>
struct alignas(16) Vector {
  T v[kVector<T>];
};

// Loads the elements column .. column + kVector - 1 of a row of `width` elements, with zeros after its end. kAligned:
// rows start at multiples of 16 bytes and the width is a multiple of kVector.
template <class T, bool kAligned>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t column, int64_t width) {
  Vector<T> out;
  if constexpr (kAligned) {
    uint4 bits{0, 0, 0, 0};
    if (column < width) bits = *reinterpret_cast<const uint4*>(row + column);
    memcpy(&out, &bits, sizeof out);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (column + i < width)
        out.v[i] = row[column + i];
      else
        memset(&out.v[i], 0, sizeof(T));
    }
  }
  return out;
}

template <class T, bool kAligned>
__device__ __forceinline__ void store_vector(T* row, int64_t column, int64_t width, const Vector<T>& vector) {
  if constexpr (kAligned) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof bits);
    *reinterpret_cast<uint4*>(row + column) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      if (column + i < width) row[column + i] = vector.v[i];
  }
}

// Returns sum + a * b. The product of two fp16 numbers is exact in fp32, so the fused instruction gives the same
// result; the product of two bf16 numbers can leave the range of fp32. The build disables fusing by the compiler.
template <class T>
__device__ __forceinline__ accumulate_t<T> multiply_add(accumulate_t<T> a, accumulate_t<T> b, accumulate_t<T> sum) {
  if constexpr (std::is_same_v<T, Half>)
    return fused_multiply_add(a, b, sum);
  else
    return sum + a * b;
}

// Adds the partial sums of a group's lanes and returns the dot product on all of its lanes.
template <class T>
__device__ __forceinline__ double add_partial_sums(const accumulate_t<T> (&sums)[kVector<T>]) {
  double wide[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) wide[i] = double(sums[i]);
#pragma unroll
  for (int lanes = kGroupLanes<T> / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) wide[i] += __shfl_xor_sync(~0u, wide[i], lanes);
#pragma unroll
  for (int half = kVector<T> / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) wide[i] += wide[i + half];
  return wide[0];
}

// The group that a thread belongs to, which processes one row, and the thread's lane in it.
template <class T>
struct GroupLane {
  int group, lane;
  __device__ explicit GroupLane(int thread) : group(thread / kGroupLanes<T>), lane(thread % kGroupLanes<T>) {}
  __device__ int64_t column() const { return int64_t(lane) * kVector<T>; }
};

// Returns a . b. All lanes of a warp must call this, each group with its own rows.
template <class T, bool kAligned>
__device__ double group_dot(const T* a, const T* b, int64_t width, int64_t column) {
  accumulate_t<T> sums[kVector<T>] = {};
  for (; column - column % kLanes < width; column += kLanes) {
    const Vector<T> va = load_vector<T, kAligned>(a, column, width), vb = load_vector<T, kAligned>(b, column, width);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sums[i] = multiply_add<T>(widen(va.v[i]), widen(vb.v[i]), sums[i]);
  }
  return add_partial_sums<T>(sums);
}

// Computes a . b and a . a, like group_dot.
template <class T, bool kAligned>
__device__ void group_dot_and_square(const T* a, const T* b, int64_t width, int64_t column, double& dot,
                                     double& square) {
  accumulate_t<T> dots[kVector<T>] = {}, squares[kVector<T>] = {};
#pragma unroll 4
  for (; column - column % kLanes < width; column += kLanes) {
    const Vector<T> va = load_vector<T, kAligned>(a, column, width), vb = load_vector<T, kAligned>(b, column, width);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const accumulate_t<T> wa = widen(va.v[i]), wb = widen(vb.v[i]);
      dots[i] = multiply_add<T>(wa, wb, dots[i]);
      squares[i] = multiply_add<T>(wa, wa, squares[i]);
    }
  }
  dot = add_partial_sums<T>(dots);
  square = add_partial_sums<T>(squares);
}

}  // namespace fastcompress::cuda
