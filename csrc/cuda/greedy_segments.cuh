// Greedy segmentation: a frame joins the current segment while its mean cosine to the segment's frames is high enough.
// The first kernel computes the norm of each row, with one group of lanes (rows.cuh) per row, and clears the output.
// The second walks each sequence frame by frame, with one block per sequence.
//
// Model, for frames of D elements of E bytes. The norms read x once, bandwidth bound. The walk reads x again, mostly
// from the second-level cache, and is bound by its chain of dependent operations. Per frame:
//   1. All threads add the previous frame to the sum of the segment, multiply the sum with this frame, and store the
//      products in shared memory: 56 instructions (SASS of sm_90) for each 16 bytes of a row, of which a thread has one
//      or two for D = 1280.
//   2. Each warp reads all products and adds them, one partial sum per lane, so that the result need not be broadcast.
//      The canonical dot product has 32 partial sums, which leaves D / 32 dependent additions: 160 cycles for D = 1280.
//   3. The tree takes five shuffles and additions in fp64, about 200 cycles; one product and one comparison follow.
// With two barriers and the round trips to shared memory this is about 700 cycles per frame on paper, 0.4 us at 1.75
// GHz, and 1,200 cycles for D = 4096. Sequences run in parallel, so the longest one determines the time. The next frame
// is copied to shared memory meanwhile. Computing the norms in the walk would add a second chain, a square root and a
// division.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace fastcompress::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) greedy_norms_kernel(GreedyParams p) {
  const GroupLane<kVector<T>> at(int(threadIdx.x));
  const int64_t t = int64_t(blockIdx.x) * (kThreads / kGroupLanes<T>)+at.group;
  const bool inside = t < p.x.count;
  // Lanes without a row use row 0, because all lanes of a warp must take part in its shuffles.
  const T* row = static_cast<const T*>(p.x.data) + (inside ? t * p.x.stride : 0);
  const double square = group_dot<T, kAligned>(row, row, int(p.x.width), at);
  wait_for_previous_launch();
  if (!inside || at.lane != 0) return;
  p.inverse_norms[t] = inverse_norm(square);
  p.starts[t] = 0;
}

// kVector numbers of the accumulation type.
template <class T>
struct alignas(16) Numbers {
  accumulate_t<T> v[kVector<T>];
};

// Adds scale * last to the sum of the segment if `keep`, else starts the sum with it; then stores the products of the
// sum with `row`. All threads of the block call this, each for its columns.
template <class T, bool kAligned>
__device__ __forceinline__ void extend(accumulate_t<T>* total, accumulate_t<T>* products, bool keep,
                                       accumulate_t<T> scale, const T* last, const T* row, int width, int thread) {
  for (int column = thread * kVector<T>; column < width; column += kThreads * kVector<T>) {
    accumulate_t<T> a[kVector<T>], b[kVector<T>];
    widen_vector<T>(load_vector<T, kAligned>(last, column, width), a);
    widen_vector<T>(load_vector<T, kAligned>(row, column, width), b);
    auto* place = reinterpret_cast<Numbers<T>*>(total + column);
    Numbers<T> sum, product;
    if (keep) sum = *place;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const accumulate_t<T> unit = scale * a[i];
      sum.v[i] = keep ? sum.v[i] + unit : unit;
      product.v[i] = sum.v[i] * b[i];
    }
    *place = sum;
    *reinterpret_cast<Numbers<T>*>(products + column) = product;
  }
}

// Returns the sum of the products, in the order of the canonical dot product, on all lanes of a warp.
template <class S>
__device__ __forceinline__ double add_products(const S* products, int pitch, int lane) {
  constexpr int kSteps = 8;  // products per lane that are loaded while the previous ones are added
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

// One block per sequence. With kStaged the sum of the segment, the products and three rows (previous, current, next)
// are in shared memory; otherwise the sum and the products are in global scratch memory.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kThreads) greedy_walk_kernel(GreedyParams p) {
  using S = accumulate_t<T>;
  FASTCOMPRESS_DYNAMIC_SHARED(shared);
  const int thread = int(threadIdx.x);
  const int width = int(p.x.width), pitch = int(padded_width(width));
  const int64_t stride = p.x.stride;
  const int64_t begin = p.sequences.begin[blockIdx.x], end = p.sequences.end[blockIdx.x];
  if (begin >= end) return;
  const T* data = static_cast<const T*>(p.x.data);
  S* total;
  if constexpr (kStaged)
    total = reinterpret_cast<S*>(shared);
  else
    total = static_cast<S*>(p.scratch) + int64_t(blockIdx.x) * 2 * pitch;
  S* products = total + pitch;
  for (int column = width + thread; column < pitch; column += kThreads) products[column] = 0;
  T* last = reinterpret_cast<T*>(products + pitch);
  T *row = last + width, *next = row + width;
  auto stage = [&](T* to, int64_t t) {
#pragma unroll 1
    for (int column = thread * kVector<T>; column < width; column += kThreads * kVector<T>)
      copy_async(shared_address(to + column), data + t * stride + column);
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
    const double dot = add_products(products, pitch, thread % 32);
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
