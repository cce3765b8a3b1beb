// Integrate-and-fire: each token is a weighted sum of consecutive rows, and neighbouring tokens share the row in which
// the first one fires. Also computes the gradients.
//
// Model, for x [N, D] of E-byte elements and M tokens: forward reads N D E bytes, and the shared rows again from cache,
// and writes M D E. Backward reads N D E and, for each row, its tokens' gradients, M D E that stay in cache, and writes
// N D E.
#include <algorithm>

#include "ops.h"

namespace fastcompress::cpu {
namespace {

constexpr int64_t kRowsAhead = 16;  // prefetch distance, as in segment_reduce.cpp
constexpr int64_t kShared = 1;      // rows that a token may share with the previous token

// Computes one row of the gradient of x: weight * grad[covering], unless `covering` is negative, plus
// first[m] * grad[m] for m in [begin, end), added from left to right.
template <class T, class S = accumulate_t<T>>
void combine_tokens(const Rows& grad, int64_t covering, S weight, const S* first, int64_t begin, int64_t end, T* out) {
  const T* data = grad.data<T>();
  const int64_t stride = grad.stride, width = grad.width, heads = end - begin;
  if (covering < 0 && heads == 0) {
    std::memset(static_cast<void*>(out), 0, size_t(width) * sizeof(T));
  } else if (heads <= 2) {  // the common case; more only if several tokens fire in one frame
    const T* row[3] = {covering < 0 ? nullptr : data + covering * stride, nullptr, nullptr};
    S factor[3] = {weight, 0, 0};
    for (int64_t i = 0; i < heads; ++i) {
      row[1 + i] = data + (begin + i) * stride;
      factor[1 + i] = first[begin + i];
    }
    row_kernels<T>().combine(row[0], factor[0], row[1], factor[1], row[2], factor[2], width, out);
  } else {
    for (int64_t k = 0; k < width; ++k) {
      S sum =
          covering < 0 ? first[begin] * widen(data[begin * stride + k]) : weight * widen(data[covering * stride + k]);
      for (int64_t m = covering < 0 ? begin + 1 : begin; m < end; ++m)
        sum = sum + first[m] * widen(data[m * stride + k]);
      narrow(sum, out[k]);
    }
  }
}

}  // namespace

Tensor integrate_rows(Tensor x, Tensor weights, Tensor first, OptionalTensor divisors, Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Rows rows = read_rows(x);
  const CheckedSegments tokens = read_segments(starts, lengths, rows.count, kShared);
  const int64_t count = tokens.list.count, width = rows.width;
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  const Tensor f = read_weights("first", first, count, x.scalar_type());
  Tensor d;
  if (divisors.has_value()) d = read_weights("divisors", *divisors, count, x.scalar_type());
  Tensor result;
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    OutputRows out(count, width, x.scalar_type(), sizeof(T));
    T* data = static_cast<T*>(out.data());
    const S* weight = static_cast<const S*>(w.const_data_ptr());
    const S* first_weight = static_cast<const S*>(f.const_data_ptr());
    const S* divisor = divisors.has_value() ? static_cast<const S*>(d.const_data_ptr()) : nullptr;
    const int64_t token_bytes = rows.count * width * int64_t(sizeof(T)) / std::max<int64_t>(1, count);
    parallel(count, token_bytes, [&](int64_t begin, int64_t end) {
      row_kernels<T>().integrate(rows.data<T>(), rows.stride, first_weight + begin, weight,
                                 divisor == nullptr ? nullptr : divisor + begin, tokens.slice(begin, end), width,
                                 kRowsAhead, data + begin * width);
    });
    result = out.finish(count);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> integrate_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor first,
                                                           Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Rows rows = read_rows(x);
  const CheckedSegments tokens = read_segments(starts, lengths, rows.count, kShared);
  const SegmentList& list = tokens.list;
  const int64_t width = rows.width;
  const Rows grad_rows = read_matrix("grad", grad, list.count, width, x.scalar_type());
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  const Tensor f = read_weights("first", first, list.count, x.scalar_type());
  Tensor grad_weights = empty_cpu({rows.count}, w.scalar_type()), grad_first = empty_cpu({list.count}, w.scalar_type());
  Tensor grad_x;
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    OutputRows out(rows.count, width, x.scalar_type(), sizeof(T));
    T* data = static_cast<T*>(out.data());
    const S* weight = static_cast<const S*>(w.const_data_ptr());
    const S* first_weight = static_cast<const S*>(f.const_data_ptr());
    S* grad_weight = static_cast<S*>(grad_weights.mutable_data_ptr());
    S* grad_first_weight = static_cast<S*>(grad_first.mutable_data_ptr());
    parallel(rows.count, 3 * width * int64_t(sizeof(T)), [&](int64_t begin, int64_t end) {
      // The first token that starts at this row or after it.
      int64_t next = std::lower_bound(list.starts, list.starts + list.count, begin) - list.starts;
      for (int64_t t = begin; t < end; ++t) {
        const T* row = rows.data<T>() + t * rows.stride;
        auto slope = [&](int64_t m) {
          return S(row_kernels<T>().dot(grad_rows.data<T>() + m * grad_rows.stride, row, width));
        };
        const bool covered = next > 0 && list.starts[next - 1] + list.lengths[next - 1] > t;
        const int64_t covering = covered ? next - 1 : -1, heads = next;
        grad_weight[t] = covered ? slope(covering) : S(0);
        for (; next < list.count && list.starts[next] == t; ++next) grad_first_weight[next] = slope(next);
        combine_tokens<T>(grad_rows, covering, weight[t], first_weight, heads, next, data + t * width);
      }
    });
    grad_x = out.finish(rows.count);
  });
  return {grad_x, grad_weights, grad_first};
}

}  // namespace fastcompress::cpu
