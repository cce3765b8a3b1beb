// Cosine distances between each row and the following rows, in one pass over x: the rows of a window stay in cache
// while they are multiplied with each other.
//
// Model, for x [N, D] of E-byte elements and W lags: x is read from memory once, and W + 1 times from cache.
// Arithmetic: W + 1 multiplications and additions per element, of which AVX2 does 8 of each in one cycle. W = 7 and D =
// 1280 are 1280 cycles per row, or 370 ns at 3.5 GHz, so the op is bound by arithmetic: memory at 25 GB/s takes 205 ns
// in fp32.
#include <limits>

#include "adjacent_distance.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

// Rows whose products are computed before their distances. The squares of the `window` rows after them are computed
// again for the next rows.
constexpr int64_t kRowsPerStep = 64;

// Computes the distances of the rows [begin, end) to later rows before `sequence_end`.
template <class T>
void score_band(const Rows& x, int64_t begin, int64_t end, int64_t sequence_end, int64_t window, int64_t reach,
                double* products, double* squares, accumulate_t<T>* d) {
  const RowKernels<T>& kernels = row_kernels<T>();
  auto row = [&](int64_t t) { return x.data<T>() + t * x.stride; };
  for (int64_t first = begin; first < end; first += kRowsPerStep) {
    const int64_t last = std::min(first + kRowsPerStep, end), end_of_squares = std::min(last + reach, sequence_end);
    for (int64_t t = first; t < last; ++t) {
      double* out = products + (t - first) * (reach + 1);
      kernels.products(row(t), x.stride, std::min(reach + 1, sequence_end - t), x.width, out);
      squares[t - first] = out[0];
    }
    for (int64_t t = last; t < end_of_squares; ++t) squares[t - first] = kernels.dot(row(t), row(t), x.width);
    for (int64_t t = first; t < last; ++t)
      for (int64_t lag = 1; lag <= std::min(reach, sequence_end - 1 - t); ++lag)
        d[t * window + lag - 1] = accumulate_t<T>(
            cosine_distance(products[(t - first) * (reach + 1) + lag], squares[t - first], squares[t - first + lag]));
  }
}

}  // namespace

Tensor banded_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t window) {
  STD_TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
  const Rows rows = read_rows(x);
  const Sequences sequences = read_sequences(x, x.dim() - 1, cu_seqlens, lengths);
  const ScalarType type = accumulate_type(x.scalar_type());
  Tensor out = x.dim() == 3 ? empty_cpu({x.size(0), x.size(1), window}, type) : empty_cpu({x.size(0), window}, type);
  // No frame has more than `reach` frames after it; the columns above are NaN.
  const int64_t reach = std::min(window, std::max<int64_t>(1, rows.count));
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    S* d = static_cast<S*>(out.mutable_data_ptr());
    std::fill(d, d + rows.count * window, std::numeric_limits<S>::quiet_NaN());
    parallel(rows.count, rows.width * reach * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      std::vector<double> products(kRowsPerStep * (reach + 1)), squares(kRowsPerStep + reach);
      for_each_part(sequences, first, last, [&](int64_t b, int64_t begin, int64_t end) {
        score_band<T>(rows, begin, end, sequences.end[b], window, reach, products.data(), squares.data(), d);
      });
    });
  });
  return out;
}

}  // namespace fastcompress::cpu
