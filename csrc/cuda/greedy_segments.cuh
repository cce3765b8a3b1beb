// Segments of frames that are alike on average. First the norms of all rows, each by a group of lanes (rows.cuh), which
// also makes no row start a segment; then a block walks each sequence, frame after frame.
//
// Model, for frames of D elements of E bytes: the norms read x once at the speed of memory; the walk reads it again,
// mostly from the second-level cache, and is bound by its chain. The order of the canonical dot product leaves a frame
// 32 partial sums and D / 32 additions that wait for each other, 160 cycles for D = 1280. All that can be done side by
// side comes before: the block adds the frame before to the sum of the segment and multiplies it with this frame, 16
// bytes of a row a thread, some 80 instructions for each that it has (one or two for D = 1280), and leaves the products
// in shared memory; then every warp, so that none has to tell the others, reads and adds them, a partial sum a lane.
// The tree takes five exchanges and additions in fp64, about 200 cycles; a product and a comparison remain. With two
// barriers and the round trips to shared memory about 700 cycles a frame on paper, 0.4 us at 1.75 GHz; 1,200 for D =
// 4096. Sequences walk side by side, so that the longest one decides. Norms taken in the walk would add a second chain,
// a root and a quotient. The next frame is copied meanwhile; it has a frame's time.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace fastcompress::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) greedy_norms_kernel(GreedyParams p) {
  const GroupLane<T> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const bool inside = t < p.x.count;
  // Lanes without a row take part in the exchanges of their warp, on row 0.
  const T* row = static_cast<const T*>(p.x.data) + (inside ? t * p.x.stride : 0);
  const double square = group_dot<T, kAligned>(row, row, p.x.width, at.column());
  if (!inside || at.lane != 0) return;
  p.inverse_norms[t] = inverse_norm(square);
  p.starts[t] = 0;
}

// As many numbers of the accumulation type as a vector has elements.
template <class T>
struct alignas(16) Numbers {
  accumulate_t<T> v[kVector<T>];
};

// scale * last is added to the sum of the segment, if `keep`, or begins it; and the products of the sum with `row`. By
// all threads, each for its columns.
template <class T, bool kAligned>
__device__ __forceinline__ void extend(accumulate_t<T>* total, accumulate_t<T>* products, bool keep,
                                       accumulate_t<T> scale, const T* last, const T* row, int64_t width, int thread) {
  for (int64_t column = thread * kVector<T>; column < width; column += kThreads * kVector<T>) {
    const Vector<T> a = load_vector<T, kAligned>(last, column, width), b = load_vector<T, kAligned>(row, column, width);
    auto* place = reinterpret_cast<Numbers<T>*>(total + column);
    Numbers<T> sum, product;
    if (keep) sum = *place;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const accumulate_t<T> unit = scale * widen(a.v[i]);
      sum.v[i] = keep ? sum.v[i] + unit : unit;
      product.v[i] = sum.v[i] * widen(b.v[i]);
    }
    *place = sum;
    *reinterpret_cast<Numbers<T>*>(products + column) = product;
  }
}

// The sum of the products, in the order of the canonical dot product, on all lanes of a warp.
template <class S>
__device__ __forceinline__ double add_products(const S* products, int pitch, int lane) {
  constexpr int kSteps = 8;  // whose products are read while those before are added
  S partial = 0, ahead[kSteps];
  auto read = [&](int first) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int column = first + i * kLanes;
      ahead[i] = column < pitch ? products[column] : S(0);
    }
  };
  read(lane);
#pragma unroll 2
  for (int first = lane; first < pitch; first += kSteps * kLanes) {
    S now[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) now[i] = ahead[i];
    read(first + kSteps * kLanes);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) partial = partial + now[i];
  }
  double dot = double(partial);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
  return dot;
}

// A block a sequence. kStaged: the sum of the segment, the products and three rows are in shared memory.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kThreads) greedy_walk_kernel(GreedyParams p) {
  using S = accumulate_t<T>;
  FASTCOMPRESS_DYNAMIC_SHARED(shared);
  const int thread = int(threadIdx.x);
  const int64_t width = p.x.width, pitch = padded_width(width), stride = p.x.stride;
  const int64_t begin = p.sequences.begin[blockIdx.x], end = p.sequences.end[blockIdx.x];
  if (begin >= end) return;
  const T* data = static_cast<const T*>(p.x.data);
  S* total;
  if constexpr (kStaged)
    total = reinterpret_cast<S*>(shared);
  else
    total = static_cast<S*>(p.scratch) + int64_t(blockIdx.x) * 2 * pitch;
  S* products = total + pitch;
  for (int64_t column = width + thread; column < pitch; column += kThreads) products[column] = 0;
  T* last = reinterpret_cast<T*>(products + pitch);
  T *row = last + width, *next = row + width;
  auto stage = [&](T* to, int64_t t) {
#pragma unroll 1
    for (int64_t column = thread * kVector<T>; column < width; column += kThreads * kVector<T>)
      copy_async(to + column, data + t * stride + column);
  };
  if (kStaged && begin + 1 < end) {
    stage(last, begin);
    stage(row, begin + 1);
  }
  if (thread == 0) p.starts[begin] = 1;
  double last_inverse = p.inverse_norms[begin];
  int64_t length = 1;
  bool joins = false;
  for (int64_t t = begin + 1; t < end; ++t) {
    const double inverse = p.inverse_norms[t];
    if (kStaged) wait_for_copies();
    __syncthreads();  // the rows are there, and the products have been read
    if (kStaged && t + 1 < end) stage(next, t + 1);
    extend<T, kStaged>(total, products, joins, S(last_inverse), kStaged ? last : data + (t - 1) * stride,
                       kStaged ? row : data + t * stride, width, thread);
    __syncthreads();
    const double dot = add_products(products, int(pitch), thread % 32);
    joins = p.linkage.joins(dot, inverse, length);
    length = joins ? length + 1 : 1;
    if (thread == 0 && !joins) p.starts[t] = 1;
    last_inverse = inverse;
    T* const oldest = last;
    last = row;
    row = next;
    next = oldest;
  }
}

}  // namespace fastcompress::cuda
