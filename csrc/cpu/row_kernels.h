// The D-wide loops, one table of functions for each element type and instruction set. Everything above them (sequences,
// rules, threads) is compiled once, for any machine.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "segment_reduce.h"

namespace fastcompress {

// Segments as rows of some matrix.
struct SegmentList {
  const int64_t* starts;
  const int64_t* lengths;
  int64_t count;
};

template <class T>
struct RowKernels {
  using S = accumulate_t<T>;

  // squares[i] = x[i] . x[i] for i < rows; dots[i] = x[i] . x[i + 1] for i < rows - 1. x[i] starts at x + i * stride.
  void (*dots)(const T* x, int64_t stride, int64_t rows, int64_t width, double* dots, double* squares);
  double (*dot)(const T* a, const T* b, int64_t width);
  // out[m] = mean, sum or maximum of the rows of segment m; 0 for an empty one. `weights` (a value a row) may be null;
  // with them a mean is weighted, and 0 where the weights add to zero. Meanwhile rows `rows_ahead` further on are asked
  // into the second-level cache.
  void (*reduce)(const T* x, int64_t stride, const S* weights, SegmentList segments, int64_t width, Reduce reduce,
                 int64_t rows_ahead, T* out);
  // out[m] = heads[m] * (first row of token m) + weights[t] * (row t, the others), over divisors[m] if there are any.
  void (*integrate)(const T* x, int64_t stride, const S* heads, const S* weights, const S* divisors, SegmentList tokens,
                    int64_t width, int64_t rows_ahead, T* out);
  // The rows of segment m become y[m], divided by its length if `mean`.
  void (*expand)(const T* y, int64_t stride, SegmentList segments, int64_t width, bool mean, T* out);
  // out = a * x + b * y + c * z, from left to right; a null pointer leaves its term out, nothing at all gives 0.
  void (*combine)(const T* x, S a, const T* y, S b, const T* z, S c, int64_t width, T* out);
  // total = scale * (the row before x), added to the total there is if `keep`; then dot = total . x, square = x . x.
  // `total` has room for `width` elements, filled up to a multiple of 32, in an order of its own; aligned to 64 bytes.
  void (*extend)(S* total, bool keep, S scale, const T* x, int64_t stride, int64_t width, double* dot, double* square);
};

// "avx512", "avx2" or "portable": the best that this machine has, or less if FASTCOMPRESS_CPU_ISA says so.
const char* cpu_isa();
template <class T>
const RowKernels<T>& row_kernels();

}  // namespace fastcompress
