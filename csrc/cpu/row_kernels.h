// Loops over the D elements of rows: one table of functions per element type and instruction set. The code above them
// (sequences, rules, threads) is compiled once, for any machine.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "segment_reduce.h"

namespace fastcompress {

// Segments as ranges of rows of a matrix.
struct SegmentList {
  const int64_t* starts;
  const int64_t* lengths;
  int64_t count;
};

template <class T>
struct RowKernels {
  using S = accumulate_t<T>;

  // squares[i] = x[i] . x[i] for i < rows; dots[i] = x[i] . x[i + 1] for i < rows - 1. Row i starts at x + i * stride.
  void (*dots)(const T* x, int64_t stride, int64_t rows, int64_t width, double* dots, double* squares);
  double (*dot)(const T* a, const T* b, int64_t width);
  // products[i] = x[0] . x[i] for i < rows.
  void (*products)(const T* x, int64_t stride, int64_t rows, int64_t width, double* products);
  // out[m] = mean, sum or maximum of the rows of segment m; 0 for an empty segment. `weights` (one per row) may be
  // null; with weights the mean is weighted, and 0 if they sum to zero. Rows `rows_ahead` after the current one are
  // prefetched into the second-level cache.
  void (*reduce)(const T* x, int64_t stride, const S* weights, SegmentList segments, int64_t width, Reduce reduce,
                 int64_t rows_ahead, T* out);
  // out[m] = heads[m] * (first row of token m) + sum of weights[t] * (row t) over its other rows; divided by
  // divisors[m] unless `divisors` is null.
  void (*integrate)(const T* x, int64_t stride, const S* heads, const S* weights, const S* divisors, SegmentList tokens,
                    int64_t width, int64_t rows_ahead, T* out);
  // Each row of segment m becomes y[m]; with `mean`, divided by the segment's length.
  void (*expand)(const T* y, int64_t stride, SegmentList segments, int64_t width, bool mean, T* out);
  // out = a * x + b * y + c * z, added from left to right. A null pointer omits its term; three give 0.
  void (*combine)(const T* x, S a, const T* y, S b, const T* z, S c, int64_t width, T* out);
  // total = scale * (row before x), plus the previous total if `keep`; then dot = total . x and square = x . x.
  // `total` has room for `width` elements rounded up to a multiple of 32, is aligned to 64 bytes, and stores them in
  // the order of the instruction set's vectors.
  void (*extend)(S* total, bool keep, S scale, const T* x, int64_t stride, int64_t width, double* dot, double* square);
};

// Returns "avx512", "avx2" or "portable": the best that this machine supports, or the value of FASTCOMPRESS_CPU_ISA.
const char* cpu_isa();
template <class T>
const RowKernels<T>& row_kernels();

}  // namespace fastcompress
