// Cosine distances between rows `lag` apart, and their gradient.
//
// Forward: rows of equal index modulo `lag` are scored like consecutive rows. Backward: the first pass computes the
// squared norm of each row, the second the factors of each pair, and the third adds up to three scaled rows per row.
#include <algorithm>
#include <limits>

#include "adjacent_distance.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

// A lag of at least the number of rows leaves no pair, so it is clipped to keep sums with it from overflowing.
int64_t bounded_lag(int64_t lag, const Rows& rows) { return std::min(lag, std::max<int64_t>(1, rows.count)); }

}  // namespace

Tensor adjacent_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t lag) {
  STD_TORCH_CHECK(lag >= 1, "lag must be at least 1, got ", lag);
  const Rows rows = read_rows(x);
  lag = bounded_lag(lag, rows);
  const Sequences sequences = read_sequences(x, x.dim() - 1, cu_seqlens, lengths);
  const ScalarType type = accumulate_type(x.scalar_type());
  Tensor out = x.dim() == 3 ? empty_cpu({x.size(0), x.size(1)}, type) : empty_cpu({x.size(0)}, type);
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    const T* data = rows.data<T>();
    S* d = static_cast<S*>(out.mutable_data_ptr());
    parallel(rows.count, rows.width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      std::fill(d + first, d + last, std::numeric_limits<S>::quiet_NaN());
      for_each_part(sequences, first, last, [&](int64_t b, int64_t begin, int64_t end) {
        // Rows t, t + lag, t + 2 lag, ... are scored as one sequence.
        const int64_t pairs_end = std::min(end, sequences.end[b] - lag);
        for (int64_t t = begin; t < std::min(begin + lag, pairs_end); ++t) {
          const int64_t pairs = (pairs_end - t + lag - 1) / lag;
          score(data + t * rows.stride, rows.stride * lag, pairs + 1, rows.width, d + t, lag);
        }
      });
    });
  });
  return out;
}

Tensor adjacent_distance_backward(Tensor grad, Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                  int64_t lag) {
  STD_TORCH_CHECK(lag >= 1, "lag must be at least 1, got ", lag);
  const Rows rows = read_rows(x);
  lag = bounded_lag(lag, rows);
  const Sequences sequences = read_sequences(x, x.dim() - 1, cu_seqlens, lengths);
  STD_TORCH_CHECK(grad.numel() == rows.count && grad.scalar_type() == accumulate_type(x.scalar_type()),
                  "grad must have the shape and dtype of the distances");
  const Tensor grad_rows = torch::stable::contiguous(grad);
  Tensor out = x.dim() == 3 ? empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type())
                            : empty_cpu({x.size(0), x.size(1)}, x.scalar_type());
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    const T* data = rows.data<T>();
    const S* g = static_cast<const S*>(grad_rows.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const int64_t width = rows.width;
    std::vector<double> squares(rows.count);
    // For each pair (t, t + lag), the gradient of either row is a sum of both: `cross` is the factor of the other row,
    // `own_first` and `own_second` are the factors of the row itself.
    std::vector<double> cross(rows.count), own_first(rows.count), own_second(rows.count);
    std::vector<uint8_t> is_pair(rows.count, 0);
    auto row = [&](int64_t t) { return data + t * rows.stride; };
    parallel(rows.count, width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) squares[t] = row_kernels<T>().dot(row(t), row(t), width);
    });
    parallel(rows.count, width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      for_each_part(sequences, first, last, [&](int64_t b, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < std::min(end, sequences.end[b] - lag); ++t) {
          const double a = squares[t], c = squares[t + lag];
          if (a == 0 && c == 0) continue;
          const double norm_a = clamped_norm(a), norm_b = clamped_norm(c);
          const double cosine = row_kernels<T>().dot(row(t), row(t + lag), width) / (norm_a * norm_b);
          is_pair[t] = 1;
          cross[t] = -double(g[t]) / (norm_a * norm_b);
          own_first[t] = norm_a > kDistanceEps ? cosine / (norm_a * norm_a) * double(g[t]) : 0;
          own_second[t] = norm_b > kDistanceEps ? cosine / (norm_b * norm_b) * double(g[t]) : 0;
        }
      });
    });
    parallel(rows.count, width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const bool next = is_pair[t], previous = t >= lag && is_pair[t - lag];
        const double own = (next ? own_first[t] : 0) + (previous ? own_second[t - lag] : 0);
        row_kernels<T>().combine(next || previous ? row(t) : nullptr, S(own), next ? row(t + lag) : nullptr,
                                 S(next ? cross[t] : 0), previous ? row(t - lag) : nullptr,
                                 S(previous ? cross[t - lag] : 0), width, out_data + t * width);
      }
    });
  });
  return out;
}

}  // namespace fastcompress::cpu
