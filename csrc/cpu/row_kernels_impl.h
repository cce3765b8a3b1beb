// The row kernels in terms of Simd<T>. Each row_kernels_<isa>.cpp includes this file after its simd_<isa>.h. Do not
// instantiate functions of the standard library here: the linker could keep the copy compiled for AVX-512 and run it on
// every machine.
#pragma once

#include "row_kernels.h"

namespace fastcompress {
namespace {

#define FASTCOMPRESS_INLINE inline __attribute__((always_inline))

template <class T>
struct Impl {
  using X = Simd<T>;
  using S = typename X::S;
  using V = typename X::V;
  static constexpr int kHalves = X::kHalves;
  static constexpr int64_t kUnit = 32;  // elements of kHalves calls of load2

  // A copy of the last elements of a row, padded with zeros to kUnit, for widths that are not a multiple of kUnit.
  // Adding 0 * 0 does not change a partial sum.
  struct Tail {
    T v[kUnit];
    FASTCOMPRESS_INLINE void read(const T* p, int64_t count) {
      std::memset(v, 0, sizeof v);
      std::memcpy(v, p, size_t(count) * sizeof(T));
    }
    FASTCOMPRESS_INLINE void write(T* p, int64_t count) const { std::memcpy(p, v, size_t(count) * sizeof(T)); }
  };

  struct Sums {
    V v[kHalves][2];
    FASTCOMPRESS_INLINE void clear() {
      for (auto& half : v) half[0] = half[1] = X::set1(0);
    }
    FASTCOMPRESS_INLINE void add(int h, const V& a0, const V& a1, const V& b0, const V& b1) {
      v[h][0] = v[h][0] + a0 * b0;
      v[h][1] = v[h][1] + a1 * b1;
    }
  };

  // ---- scores ----

  static double dot(const T* a, const T* b, int64_t width) {
    Sums sums;
    sums.clear();
    const int64_t whole = width - width % kUnit;
    for (int64_t k = 0; k < whole; k += kUnit) add_dot(a + k, b + k, sums);
    if (whole < width) {
      Tail tail_a, tail_b;
      tail_a.read(a + whole, width - whole);
      tail_b.read(b + whole, width - whole);
      add_dot(tail_a.v, tail_b.v, sums);
    }
    return X::tree(sums.v);
  }

  static FASTCOMPRESS_INLINE void add_dot(const T* a, const T* b, Sums& sums) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      V a0, a1, b0, b1;
      X::load2(a, h, a0, a1);
      X::load2(b, h, b0, b1);
      sums.add(h, a0, a1, b0, b1);
    }
  }

  // Prefetch distance in rows, into the second-level cache, while rows are scored. Measured on rows of 1280 elements,
  // AMD EPYC 9004, one thread:
  //
  //     GB/s               fp32   bf16
  //     without prefetch     15     11
  //     with prefetch        21     27
  //     reading alone        25     29
  //
  // 4 rows are too few, and 8 to 32 are equally fast. Prefetching into the first-level cache gains nothing.
  static constexpr int64_t kRowsAhead = 8;
  static FASTCOMPRESS_INLINE void prefetch_unit(const T* p) {  // never faults, wherever p points
    for (size_t byte = 0; byte < kUnit * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }

  // Scores R rows at once, each with the row before it, so that each row is loaded once.
  template <int R>
  static FASTCOMPRESS_INLINE void add_rows(const T* row, int64_t stride, Sums (&dots)[R], Sums (&squares)[R]) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      V last0, last1, this0, this1;
      X::load2(row - stride, h, last0, last1);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        X::load2(row + r * stride, h, this0, this1);
        dots[r].add(h, last0, last1, this0, this1);
        squares[r].add(h, this0, this1, this0, this1);
        last0 = this0;
        last1 = this1;
      }
    }
  }

  template <int R>
  static FASTCOMPRESS_INLINE void score_rows(const T* row, int64_t stride, int64_t width, double* dots,
                                             double* squares) {
    Sums dot_sums[R], square_sums[R];
    for (int r = 0; r < R; ++r) {
      dot_sums[r].clear();
      square_sums[r].clear();
    }
    const int64_t whole = width - width % kUnit;
    for (int64_t k = 0; k < whole; k += kUnit) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) prefetch_unit(row + (r + kRowsAhead) * stride + k);
      add_rows<R>(row + k, stride, dot_sums, square_sums);
    }
    if (whole < width) {
      Tail tails[R + 1];
      for (int r = 0; r <= R; ++r) tails[r].read(row + (r - 1) * stride + whole, width - whole);
      add_rows<R>(tails[1].v, kUnit, dot_sums, square_sums);
    }
    for (int r = 0; r < R; ++r) {
      dots[r] = X::tree(dot_sums[r].v);
      squares[r] = X::tree(square_sums[r].v);
    }
  }

  static void dots(const T* x, int64_t stride, int64_t rows, int64_t width, double* dots, double* squares) {
    if (rows < 1) return;
    squares[0] = dot(x, x, width);
    int64_t i = 1;
    for (; i + X::kRows <= rows; i += X::kRows)
      score_rows<X::kRows>(x + i * stride, stride, width, dots + i - 1, squares + i);
    for (; i < rows; ++i) score_rows<1>(x + i * stride, stride, width, dots + i - 1, squares + i);
  }

  // Multiplies one row with R rows, so that it is loaded once for all of them.
  template <int R>
  static FASTCOMPRESS_INLINE void add_products(const T* row, const T* others, int64_t stride, Sums (&sums)[R]) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      V a0, a1, b0, b1;
      X::load2(row, h, a0, a1);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        X::load2(others + r * stride, h, b0, b1);
        sums[r].add(h, a0, a1, b0, b1);
      }
    }
  }

  // Prefetches the elements at `ahead`, which follows `row`.
  template <int R>
  static FASTCOMPRESS_INLINE void multiply_rows(const T* row, const T* others, int64_t stride, int64_t width,
                                                const T* ahead, double* products) {
    Sums sums[R];
    for (Sums& sum : sums) sum.clear();
    const int64_t whole = width - width % kUnit;
    for (int64_t k = 0; k < whole; k += kUnit) {
      prefetch_unit(ahead + k);
      add_products<R>(row + k, others + k, stride, sums);
    }
    if (whole < width) {
      Tail tail, tails[R];
      tail.read(row + whole, width - whole);
      for (int r = 0; r < R; ++r) tails[r].read(others + r * stride + whole, width - whole);
      add_products<R>(tail.v, tails[0].v, kUnit, sums);
    }
    for (int r = 0; r < R; ++r) products[r] = X::tree(sums[r].v);
  }

  static void products(const T* x, int64_t stride, int64_t rows, int64_t width, double* products) {
    const T* ahead = x + (rows + kRowsAhead) * stride;
    int64_t i = 0;
    for (; i + X::kPartners <= rows; i += X::kPartners)
      multiply_rows<X::kPartners>(x, x + i * stride, stride, width, ahead, products + i);
    for (; i < rows; ++i) multiply_rows<1>(x, x + i * stride, stride, width, ahead, products + i);
  }

  // ---- reductions ----

  enum class Mode { kSum, kWeighted, kMax };

  template <Mode kMode>
  static FASTCOMPRESS_INLINE void load_weighted(const T* p, int u, int64_t ahead, const S* weight, V& a, V& b) {
    p += u / kHalves * kUnit;
    X::load2(p, u % kHalves, a, b);
    if (u % kHalves == 0) prefetch_unit(p + ahead);
    if constexpr (kMode == Mode::kWeighted) {
      const V w = X::set1(*weight);
      a = a * w;
      b = b * w;
    }
  }

  // Reduces kUnits pairs of vectors over the rows 0 .. count - 1, count >= 1, in blocks of kBlock rows. Elements
  // `ahead` after the current ones are prefetched. `head` points to the weight of row 0.
  template <int kUnits, Mode kMode, class Row>
  static FASTCOMPRESS_INLINE void reduce_columns(Row row, const S* head, const S* weights, int64_t count, int64_t ahead,
                                                 V (&total)[kUnits][2]) {
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t last = first + kBlock > count ? count : first + kBlock;
      V block[kUnits][2];
      const T* p = row(first);
      const S* weight = first == 0 ? head : weights + first;
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) load_weighted<kMode>(p, u, ahead, weight, block[u][0], block[u][1]);
      for (int64_t i = first + 1; i < last; ++i) {
        p = row(i);
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) {
          V a, b;
          load_weighted<kMode>(p, u, ahead, weights + i, a, b);
          block[u][0] = join<kMode>(block[u][0], a);
          block[u][1] = join<kMode>(block[u][1], b);
        }
      }
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u)
        for (int j = 0; j < 2; ++j) total[u][j] = first == 0 ? block[u][j] : join<kMode>(total[u][j], block[u][j]);
    }
  }

  template <Mode kMode>
  static FASTCOMPRESS_INLINE V join(const V& a, const V& b) {
    if constexpr (kMode == Mode::kMax) return X::later_max(a, b);
    return a + b;
  }

  template <int kUnits>
  static FASTCOMPRESS_INLINE void write_columns(V (&total)[kUnits][2], bool divide, S divisor, T* out) {
    const V d = X::set1(divisor);
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      if (divide) {
        total[u][0] = total[u][0] / d;
        total[u][1] = total[u][1] / d;
      }
      X::store2(out + u / kHalves * kUnit, u % kHalves, total[u][0], total[u][1]);
    }
  }

  template <Mode kMode>
  static void reduce_segment(const T* x, int64_t stride, const S* head, const S* weights, int64_t count, int64_t width,
                             int64_t ahead, bool divide, S divisor, T* out) {
    constexpr int kUnits = X::kStrip;
    constexpr int64_t kColumns = kUnits / kHalves * kUnit;
    int64_t k = 0;
    for (; k + kColumns <= width; k += kColumns) {
      V total[kUnits][2];
      reduce_columns<kUnits, kMode>([=](int64_t i) { return x + i * stride + k; }, head, weights, count, ahead, total);
      write_columns<kUnits>(total, divide, divisor, out + k);
    }
    for (; k + kUnit <= width; k += kUnit) {
      V total[kHalves][2];
      reduce_columns<kHalves, kMode>([=](int64_t i) { return x + i * stride + k; }, head, weights, count, ahead, total);
      write_columns<kHalves>(total, divide, divisor, out + k);
    }
    if (k < width) {
      Tail tail;
      V total[kHalves][2];
      auto row = [&tail, x, stride, k, width](int64_t i) {
        tail.read(x + i * stride + k, width - k);
        return tail.v;
      };
      reduce_columns<kHalves, kMode>(row, head, weights, count, 0, total);
      write_columns<kHalves>(total, divide, divisor, tail.v);
      tail.write(out + k, width - k);
    }
  }

  static void reduce(const T* x, int64_t stride, const S* weights, SegmentList segments, int64_t width, Reduce reduce,
                     int64_t rows_ahead, T* out) {
    const int64_t ahead = rows_ahead * stride;
    for (int64_t m = 0; m < segments.count; ++m, out += width) {
      const int64_t start = segments.starts[m], count = segments.lengths[m];
      const T* rows = x + start * stride;
      if (count == 0) {
        std::memset(out, 0, size_t(width) * sizeof(T));
      } else if (reduce == Reduce::kMax) {
        reduce_segment<Mode::kMax>(rows, stride, nullptr, nullptr, count, width, ahead, false, 1, out);
      } else if (weights == nullptr) {
        reduce_segment<Mode::kSum>(rows, stride, nullptr, nullptr, count, width, ahead, reduce == Reduce::kMean,
                                   S(count), out);
      } else {
        const S total = sum_of_weights(weights + start, count);
        if (total == 0)
          std::memset(out, 0, size_t(width) * sizeof(T));
        else
          reduce_segment<Mode::kWeighted>(rows, stride, weights + start, weights + start, count, width, ahead, true,
                                          total, out);
      }
    }
  }

  static void integrate(const T* x, int64_t stride, const S* heads, const S* weights, const S* divisors,
                        SegmentList tokens, int64_t width, int64_t rows_ahead, T* out) {
    for (int64_t m = 0; m < tokens.count; ++m, out += width) {
      const int64_t start = tokens.starts[m];
      const bool divide = divisors != nullptr;
      reduce_segment<Mode::kWeighted>(x + start * stride, stride, heads + m, weights + start, tokens.lengths[m], width,
                                      rows_ahead * stride, divide, divide ? divisors[m] : S(1), out);
    }
  }

  // ---- adjoints ----

  template <int kUnits>
  static FASTCOMPRESS_INLINE void expand_columns(const T* y, bool divide, S divisor, int64_t count, int64_t width,
                                                 T* out) {
    V values[kUnits][2];
    const V d = X::set1(divisor);
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      X::load2(y + u / kHalves * kUnit, u % kHalves, values[u][0], values[u][1]);
      if (divide) {
        values[u][0] = values[u][0] / d;
        values[u][1] = values[u][1] / d;
      }
    }
    for (int64_t i = 0; i < count; ++i, out += width)
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) X::store2(out + u / kHalves * kUnit, u % kHalves, values[u][0], values[u][1]);
  }

  static void expand(const T* y, int64_t stride, SegmentList segments, int64_t width, bool mean, T* out) {
    constexpr int kUnits = X::kStrip;
    constexpr int64_t kColumns = kUnits / kHalves * kUnit;
    for (int64_t m = 0; m < segments.count; ++m, y += stride) {
      const int64_t count = segments.lengths[m];
      T* rows = out + segments.starts[m] * width;
      int64_t k = 0;
      for (; k + kColumns <= width; k += kColumns)
        expand_columns<kUnits>(y + k, mean, S(count), count, width, rows + k);
      for (; k + kUnit <= width; k += kUnit) expand_columns<kHalves>(y + k, mean, S(count), count, width, rows + k);
      if (k < width && count > 0) {
        Tail tail;
        tail.read(y + k, width - k);
        expand_columns<kHalves>(tail.v, mean, S(count), 1, width, tail.v);
        for (int64_t i = 0; i < count; ++i) tail.write(rows + i * width + k, width - k);
      }
    }
  }

  static void combine(const T* x, S a, const T* y, S b, const T* z, S c, int64_t width, T* out) {
    const T* rows[3] = {x, y, z};
    const S factors[3] = {a, b, c};
    for (int64_t k = 0; k < width; ++k) {
      S sum = 0;
      bool empty = true;
      for (int r = 0; r < 3; ++r) {
        if (rows[r] == nullptr) continue;
        const S term = factors[r] * widen(rows[r][k]);
        sum = empty ? term : sum + term;
        empty = false;
      }
      narrow(sum, out[k]);
    }
  }

  // ---- running sums ----

  template <bool kKeep>
  static FASTCOMPRESS_INLINE void extend_unit(S* total, const V& scale, const T* last, const T* x, Sums& dots,
                                              Sums& squares) {
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      V sum[2], x0, x1;
      X::load2(last, h, sum[0], sum[1]);
      X::load2(x, h, x0, x1);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        S* place = total + (2 * h + j) * int64_t(sizeof(V) / sizeof(S));
        sum[j] = sum[j] * scale;
        if constexpr (kKeep) {
          V before;
          std::memcpy(&before, place, sizeof(V));
          sum[j] = before + sum[j];
        }
        std::memcpy(place, &sum[j], sizeof(V));
      }
      dots.add(h, sum[0], sum[1], x0, x1);
      squares.add(h, x0, x1, x0, x1);
    }
  }

  template <bool kKeep>
  static FASTCOMPRESS_INLINE void extend_row(S* total, S scale, const T* x, int64_t stride, int64_t width, double* dot,
                                             double* square) {
    Sums dots, squares;
    dots.clear();
    squares.clear();
    const V factor = X::set1(scale);
    const T* last = x - stride;
    const int64_t whole = width - width % kUnit;
    for (int64_t k = 0; k < whole; k += kUnit) {
      prefetch_unit(x + kRowsAhead * stride + k);
      extend_unit<kKeep>(total + k, factor, last + k, x + k, dots, squares);
    }
    if (whole < width) {
      Tail tail_last, tail_x;
      tail_last.read(last + whole, width - whole);
      tail_x.read(x + whole, width - whole);
      extend_unit<kKeep>(total + whole, factor, tail_last.v, tail_x.v, dots, squares);
    }
    *dot = X::tree(dots.v);
    *square = X::tree(squares.v);
  }

  static void extend(S* total, bool keep, S scale, const T* x, int64_t stride, int64_t width, double* dot,
                     double* square) {
    if (keep)
      extend_row<true>(total, scale, x, stride, width, dot, square);
    else
      extend_row<false>(total, scale, x, stride, width, dot, square);
  }

  static constexpr RowKernels<T> table() { return {dots, dot, products, reduce, integrate, expand, combine, extend}; }
};

}  // namespace
}  // namespace fastcompress
