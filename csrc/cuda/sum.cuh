// The sum of a segment in its defined order: blocks of kBlock frames, the blocks added in order (segment_reduce.h).
//
// Model, for R rows at one vector of N columns: R loads, R N widenings of a half type and (R - 1) N additions. Rows are
// loaded kRowsAhead at a time, before the first of them is added. More rows take a loop, with N more additions per
// block. A thread waits about once per step of the loop: a segment of 1,500 rows that are not in a cache takes 375
// times the latency of memory. Eight rows at a time would halve that, but spill registers of segment_pool on sm_120.
#pragma once

#include "../segment_reduce.h"
#include "rows.cuh"

namespace fastcompress::cuda {

constexpr int kRowsAhead = 4;
static_assert(kBlock % kRowsAhead == 0);

// A vector of columns in consecutive rows in global memory.
template <class T, bool kAligned, Keep kKeep = Keep::kYes>
struct GlobalColumn {
  const T* at;     // the first column, in the first row
  int64_t stride;  // elements between rows
  int left;        // columns from the first one to the end of the row

  __device__ Vector<T> load(int row) const { return load_vector<T, kAligned, kKeep>(at + row * stride, 0, left); }
  __device__ void advance(int rows) { at += rows * stride; }
};

// The same in shared memory, where a vector is aligned.
template <class T>
struct SharedColumn {
  SharedAddress at;
  int pitch;  // bytes between rows

  __device__ Vector<T> load(int row) const {
    Vector<T> out;
    unpack(load_shared(at + row * pitch), out.words);
    return out;
  }
  __device__ void advance(int rows) { at += rows * pitch; }
};

// Loads the rows base + i < count of a chunk, and then calls add(i, row) for each, converted by widen(base + i, ...).
template <class T, class Index, class Column, class Widen, class Add>
__device__ __forceinline__ void add_chunk(Index base, Index count, const Column& column, const Widen& widen,
                                          const Add& add) {
  Vector<T> rows[kRowsAhead];
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i)
    if (base + i < count) rows[i] = column.load(i);
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    if (base + i >= count) break;
    accumulate_t<T> row[kVector<T>];
    widen(base + i, rows[i], row);
    add(i, row);
  }
}

// Computes the sum of `count` >= 1 rows at one vector of columns. `widen(i, vector, row)` converts row i; `join(a, b)`
// returns the sum, or maximum, of a and b. join(join.kNone, a) is a.
template <class T, class Index, class Column, class Widen, class Join>
__device__ __forceinline__ void ordered_sum(Index count, Column column, const Widen& widen, const Join& join,
                                            accumulate_t<T> (&total)[kVector<T>]) {
  using S = accumulate_t<T>;
  constexpr int N = kVector<T>;
  if (count <= kRowsAhead) {
    add_chunk<T, Index>(0, count, column, widen, [&](int i, const S(&row)[N]) {
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] = i == 0 ? row[k] : join(total[k], row[k]);
    });
    return;
  }
  S block[N];
#pragma unroll
  for (int k = 0; k < N; ++k) block[k] = total[k] = Join::kNone;
#pragma unroll 1
  for (Index base = 0; base < count; base += kRowsAhead) {
    if (base > 0 && base % Index(kBlock) == 0) {
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] = join(total[k], block[k]), block[k] = Join::kNone;
    }
    add_chunk<T>(base, count, column, widen, [&](int, const S(&row)[N]) {
#pragma unroll
      for (int k = 0; k < N; ++k) block[k] = join(block[k], row[k]);
    });
    column.advance(kRowsAhead);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] = join(total[k], block[k]);
}

template <class S>
struct Add {
  static constexpr S kNone = S(-0.0);  // 0 + -0 is 0, and -0 + -0 is -0
  __device__ S operator()(S a, S b) const { return a + b; }
};

}  // namespace fastcompress::cuda
