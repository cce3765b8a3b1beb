// Rows of a matrix as vectors of up to 16 bytes, and the canonical dot product of two rows by a group of lanes.
//
// Partial sum j of the canonical dot product takes the elements i = j (mod 32) in increasing i (cosine.h). A group of
// 32 / N lanes therefore processes one row: lane l keeps the N partial sums from l * N on and reads N elements in each
// step of 32. With 16 bytes per lane, a warp processes 8 rows of a half type, 4 of fp32 or 2 of fp64 at once.
#pragma once

#include <cstring>
#include <type_traits>

#include "../cosine.h"
#include "../dtype.h"
#include "device.h"

namespace fastcompress::cuda {

// Elements in 16 bytes, and lanes of a group that reads 16 bytes per lane.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));
template <class T>
constexpr int kGroupLanes = kLanes / kVector<T>;

// The integer type that one instruction moves.
template <int kBytes>
struct Move;
template <>
struct Move<4> {
  using type = unsigned;
};
template <>
struct Move<8> {
  using type = uint2;
};
template <>
struct Move<16> {
  using type = uint4;
};

// N elements of a row, in 4, 8 or 16 bytes. They are words and not elements from load to store: for a copy of elements
// into a uint4, nvcc emits four stores of 4 bytes.
template <class T, int N = kVector<T>>
struct alignas(N * sizeof(T)) Vector {
  static constexpr int kWords = N * int(sizeof(T)) / 4;
  unsigned words[kWords];
};

template <class T>
__device__ __forceinline__ Vector<T> zero_vector() {
  return Vector<T>{};
}

__device__ __forceinline__ void unpack(unsigned bits, unsigned (&words)[1]) { words[0] = bits; }
__device__ __forceinline__ void unpack(uint2 bits, unsigned (&words)[2]) { words[0] = bits.x, words[1] = bits.y; }
__device__ __forceinline__ void unpack(uint4 bits, unsigned (&words)[4]) {
  words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
}

// Whether a row is read for the last time, so that the caches need not keep it.
enum class Keep { kYes, kNo };

// Loads N elements from an address that is a multiple of their size.
template <class T, int N = kVector<T>, Keep kKeep = Keep::kYes>
__device__ __forceinline__ Vector<T, N> load_words(const T* from) {
  const auto* source = reinterpret_cast<const typename Move<N* int(sizeof(T))>::type*>(from);
  Vector<T, N> out;
  unpack(kKeep == Keep::kYes ? *source : load_streaming(source), out.words);
  return out;
}

// Loads the elements column .. column + N - 1 of a row of `width` elements, with zeros after its end. kAligned: rows
// start at multiples of 16 bytes and the width is a multiple of kVector; then `column` must be inside the row.
template <class T, bool kAligned, Keep kKeep = Keep::kYes, int N = kVector<T>>
__device__ __forceinline__ Vector<T, N> load_vector(const T* row, int column, int width) {
  if constexpr (kAligned) {
    return load_words<T, N, kKeep>(row + column);
  } else {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < width)
        elements[i] = row[column + i];
      else
        memset(&elements[i], 0, sizeof(T));
    }
    Vector<T, N> out;
    memcpy(out.words, elements, sizeof out);
    return out;
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void store_vector(T* row, int column, int width, const Vector<T>& vector) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(row + column) = uint4{vector.words[0], vector.words[1], vector.words[2], vector.words[3]};
  } else {
    T elements[kVector<T>];
    memcpy(elements, vector.words, sizeof elements);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      if (column + i < width) row[column + i] = elements[i];
  }
}

// ---- conversion ----

// Converts the two elements of a word. There is one instruction per element to widen, and one per word to narrow.
template <class T>
__device__ __forceinline__ void widen_pair(unsigned word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = bits_float(word << 16);
    high = bits_float(word & 0xffff0000);
  } else {
#ifdef __CUDA_ARCH__
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = widen(Half{uint16_t(word)});
    high = widen(Half{uint16_t(word >> 16)});
#endif
  }
}
template <class T>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  unsigned word;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  T narrow_low, narrow_high;
  narrow(low, narrow_low);
  narrow(high, narrow_high);
  return unsigned(narrow_high.bits) << 16 | narrow_low.bits;
#endif
}

template <class T, int N>
__device__ __forceinline__ void widen_vector(const Vector<T, N>& vector, accumulate_t<T> (&out)[N]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int w = 0; w < N / 2; ++w) widen_pair<T>(vector.words[w], out[2 * w], out[2 * w + 1]);
  } else {
    memcpy(out, vector.words, sizeof out);
  }
}

template <class T>
__device__ __forceinline__ Vector<T> narrow_vector(const accumulate_t<T> (&values)[kVector<T>]) {
  Vector<T> out;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int w = 0; w < kVector<T> / 2; ++w) out.words[w] = narrow_pair<T>(values[2 * w], values[2 * w + 1]);
  } else {
    memcpy(out.words, values, sizeof out);
  }
  return out;
}

// ---- dot products ----

// Returns sum + a * b. The product of two fp16 numbers is exact in fp32, so the fused instruction gives the same
// result; the product of two bf16 numbers can leave the range of fp32. The build disables fusing by the compiler.
template <class T>
__device__ __forceinline__ accumulate_t<T> multiply_add(accumulate_t<T> a, accumulate_t<T> b, accumulate_t<T> sum) {
  if constexpr (std::is_same_v<T, Half>)
    return fused_multiply_add(a, b, sum);
  else
    return sum + a * b;
}

template <class T, int N>
__device__ __forceinline__ void multiply_add(const accumulate_t<T> (&a)[N], const accumulate_t<T> (&b)[N],
                                             accumulate_t<T> (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = multiply_add<T>(a[i], b[i], sums[i]);
}

// Adds the partial sums of a group of kGroup = 32 / N lanes in the canonical order, and returns the dot product on all
// of its lanes. All lanes of a warp must call this.
//
// Each of the five steps adds the values of the lanes `kWith` apart. A lane that holds several values exchanges half of
// them, so that each of the two lanes adds the other half. After that, the lane bit `kWith` selects the half. The last
// steps, for partial sums of one lane, therefore add values of two lanes, too. For N = 8 this takes 9 additions and 14
// shuffle instructions instead of 23 and 32.
template <int kGroup, int kWith = kGroup / 2, int kSteps = 5, class V, int N>
__device__ __forceinline__ double add_partial_sums(const V (&values)[N], int lane) {
  constexpr int kHalf = N > 1 ? N / 2 : 1;
  const bool upper = (lane & kWith) != 0;
  double sums[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const V mine = N > 1 && upper ? values[N / 2 + i] : values[i];
    const V other = N > 1 && !upper ? values[N / 2 + i] : values[i];
    sums[i] = double(mine) + double(__shfl_xor_sync(~0u, other, kWith));
  }
  if constexpr (kSteps == 1)
    return sums[0];
  else
    return add_partial_sums<kGroup, kWith == 1 ? kGroup / 2 : kWith / 2, kSteps - 1>(sums, lane);
}

// The group of 32 / N lanes that a thread belongs to, and the thread's lane in it.
template <int N>
struct GroupLane {
  static constexpr int kGroup = kLanes / N;
  int group, lane;
  __device__ explicit GroupLane(int thread) : group(thread / kGroup), lane(thread % kGroup) {}
  __device__ int column() const { return lane * N; }
};

// Calls step(vectors) for each step of 32 columns of K rows of `width` elements: vectors[k] has the elements of row k
// that belong to this lane. Every step but an incomplete last one loads without a condition.
template <class T, bool kAligned, int N, int K, class Step>
__device__ __forceinline__ void for_each_step(const T* const (&rows)[K], int width, int column, const Step& step) {
  Vector<T, N> vectors[K];
  const T* at[K];
#pragma unroll
  for (int k = 0; k < K; ++k) at[k] = rows[k] + column;
#pragma unroll 4
  for (int left = width; left >= kLanes; left -= kLanes) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      vectors[k] = load_vector<T, kAligned, Keep::kYes, N>(at[k], 0, N);
      at[k] += kLanes;
    }
    step(vectors);
  }
  if (width % kLanes == 0) return;
  const int left = width % kLanes - column;
#pragma unroll
  for (int k = 0; k < K; ++k)
    vectors[k] = left > 0 ? load_vector<T, kAligned, Keep::kYes, N>(at[k], 0, left) : Vector<T, N>{};
  step(vectors);
}

// Returns a . b. All lanes of a warp must call this, each group with its own rows.
template <class T, bool kAligned>
__device__ double group_dot(const T* a, const T* b, int width, const GroupLane<kVector<T>>& at) {
  constexpr int N = kVector<T>;
  accumulate_t<T> sums[N] = {};
  for_each_step<T, kAligned, N>({a, b}, width, at.column(), [&](const Vector<T, N>(&rows)[2]) {
    accumulate_t<T> wide_a[N], wide_b[N];
    widen_vector<T>(rows[0], wide_a);
    widen_vector<T>(rows[1], wide_b);
    multiply_add<T>(wide_a, wide_b, sums);
  });
  return add_partial_sums<at.kGroup>(sums, at.lane);
}

}  // namespace fastcompress::cuda
