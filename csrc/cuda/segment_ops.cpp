// Host code of the CUDA ops over given segments: reductions, their gradients, integrate-and-fire.
#include "ops.h"
#include "tensors.h"

namespace fastcompress::cuda {
namespace {

// Segments that the caller passed, and a flag that kernels set if they are invalid (only with FASTCOMPRESS_CHECK=1).
class GivenSegments {
 public:
  GivenSegments(const Tensor& starts, const Tensor& lengths, int64_t rows, Stream stream) : error_(starts, stream) {
    STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && lengths.scalar_type() == ScalarType::Long,
                    "starts and lengths must be int64");
    STD_TORCH_CHECK(starts.dim() == 1 && lengths.dim() == 1 && starts.size(0) == lengths.size(0),
                    "starts and lengths must have the same shape [M]");
    starts_ = torch::stable::contiguous(starts);
    lengths_ = torch::stable::contiguous(lengths);
    in = {static_cast<const int64_t*>(starts_.const_data_ptr()), static_cast<const int64_t*>(lengths_.const_data_ptr()),
          starts.size(0), rows, error_.data};
  }

  void finish(Stream stream, const char* what = "segments must be in order, without overlap") const {
    STD_TORCH_CHECK(!error_.read(stream), what, " and lie inside ", in.rows, " rows");
  }

  SegmentsIn in;

 private:
  ErrorFlag error_;
  Tensor starts_, lengths_;
};

}  // namespace

Tensor segment_reduce(Tensor x, Tensor starts, Tensor lengths, std::string reduce) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const GivenSegments segments(starts, lengths, rows.count, scope.stream);
  Tensor out = empty_like(x, {segments.in.count, rows.width}, x.scalar_type());
  const ReduceParams p{rows_in(rows),          segments.in, read_reduce(reduce), nullptr, {}, {},
                       out.mutable_data_ptr(), nullptr};
  check(launch_segment_reduce_fwd(dtype_of("x", x), p, scope.stream), "segment_reduce");
  segments.finish(scope.stream);
  return out;
}

Tensor segment_weighted_mean(Tensor x, Tensor weights, Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  const GivenSegments segments(starts, lengths, rows.count, scope.stream);
  Tensor out = empty_like(x, {segments.in.count, rows.width}, x.scalar_type());
  const ReduceParams p{rows_in(rows),          segments.in, Reduce::kMean, w.const_data_ptr(), {}, {},
                       out.mutable_data_ptr(), nullptr};
  check(launch_segment_weighted_mean_fwd(dtype_of("x", x), p, scope.stream), "segment_weighted_mean");
  segments.finish(scope.stream);
  return out;
}

Tensor segment_expand(Tensor y, Tensor starts, Tensor lengths, int64_t num_rows, std::string reduce_name) {
  STD_TORCH_CHECK(num_rows >= 0, "num_rows must not be negative, got ", num_rows);
  const Reduce reduce = read_reduce(reduce_name);
  STD_TORCH_CHECK(reduce != Reduce::kMax, "segment_expand does not support reduce 'max'");
  const Scope scope(y);
  const GivenSegments segments(starts, lengths, num_rows, scope.stream);
  STD_TORCH_CHECK(y.dim() == 2 && y.size(0) == segments.in.count, "y must have one row per segment");
  const Rows rows = read_rows(y);
  Tensor out = empty_like(y, {num_rows, rows.width}, y.scalar_type());
  const ReduceParams p{rows_in(rows), segments.in, reduce, nullptr, {}, {}, out.mutable_data_ptr(), nullptr};
  check(launch_segment_expand_fwd(dtype_of("y", y), p, scope.stream), "segment_expand");
  segments.finish(scope.stream);
  return out;
}

Tensor segment_max_backward(Tensor grad, Tensor x, Tensor y, Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const GivenSegments segments(starts, lengths, rows.count, scope.stream);
  const Rows grad_rows = read_matrix("grad", grad, segments.in.count, rows.width, x.scalar_type());
  const Rows y_rows = read_matrix("y", y, segments.in.count, rows.width, x.scalar_type());
  Tensor out = empty_like(x, {rows.count, rows.width}, x.scalar_type());
  const ReduceParams p{rows_in(rows),   segments.in,        Reduce::kMax,           nullptr,
                       rows_in(y_rows), rows_in(grad_rows), out.mutable_data_ptr(), nullptr};
  check(launch_segment_max_bwd(dtype_of("x", x), p, scope.stream), "segment_max_backward");
  segments.finish(scope.stream);
  return out;
}

std::tuple<Tensor, Tensor> segment_weighted_mean_backward(Tensor grad, Tensor x, Tensor y, Tensor weights,
                                                          Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const GivenSegments segments(starts, lengths, rows.count, scope.stream);
  const Rows grad_rows = read_matrix("grad", grad, segments.in.count, rows.width, x.scalar_type());
  const Rows y_rows = read_matrix("y", y, segments.in.count, rows.width, x.scalar_type());
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  Tensor grad_x = empty_like(x, {rows.count, rows.width}, x.scalar_type());
  Tensor grad_weights = empty_like(x, {rows.count}, w.scalar_type());
  const ReduceParams p{rows_in(rows),
                       segments.in,
                       Reduce::kMean,
                       w.const_data_ptr(),
                       rows_in(y_rows),
                       rows_in(grad_rows),
                       grad_x.mutable_data_ptr(),
                       grad_weights.mutable_data_ptr()};
  check(launch_segment_weighted_mean_bwd(dtype_of("x", x), p, scope.stream), "segment_weighted_mean_backward");
  segments.finish(scope.stream);
  return {grad_x, grad_weights};
}

// Error message for invalid tokens.
constexpr const char* kTokens = "tokens must be in order, have at least one row each, share only their first row";

Tensor integrate_rows(Tensor x, Tensor weights, Tensor first, OptionalTensor divisors, Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const GivenSegments tokens(starts, lengths, rows.count, scope.stream);
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  const Tensor f = read_weights("first", first, tokens.in.count, x.scalar_type());
  Tensor d;
  if (divisors.has_value()) d = read_weights("divisors", *divisors, tokens.in.count, x.scalar_type());
  Tensor out = empty_like(x, {tokens.in.count, rows.width}, x.scalar_type());
  const IntegrateParams p{rows_in(rows),
                          {},
                          tokens.in,
                          w.const_data_ptr(),
                          f.const_data_ptr(),
                          divisors.has_value() ? d.const_data_ptr() : nullptr,
                          out.mutable_data_ptr(),
                          nullptr,
                          nullptr};
  check(launch_integrate_rows_fwd(dtype_of("x", x), p, scope.stream), "integrate_rows");
  tokens.finish(scope.stream, kTokens);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> integrate_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor first,
                                                           Tensor starts, Tensor lengths) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape [N, D]");
  const Scope scope(x);
  const Rows rows = read_rows(x);
  const GivenSegments tokens(starts, lengths, rows.count, scope.stream);
  const Rows grad_rows = read_matrix("grad", grad, tokens.in.count, rows.width, x.scalar_type());
  const Tensor w = read_weights("weights", weights, rows.count, x.scalar_type());
  const Tensor f = read_weights("first", first, tokens.in.count, x.scalar_type());
  Tensor grad_x = empty_like(x, {rows.count, rows.width}, x.scalar_type());
  Tensor grad_weights = empty_like(x, {rows.count}, w.scalar_type());
  Tensor grad_first = empty_like(x, {tokens.in.count}, w.scalar_type());
  const IntegrateParams p{rows_in(rows),
                          rows_in(grad_rows),
                          tokens.in,
                          w.const_data_ptr(),
                          f.const_data_ptr(),
                          nullptr,
                          grad_x.mutable_data_ptr(),
                          grad_weights.mutable_data_ptr(),
                          grad_first.mutable_data_ptr()};
  check(launch_integrate_rows_bwd(dtype_of("x", x), p, scope.stream), "integrate_rows_backward");
  tokens.finish(scope.stream, kTokens);
  return {grad_x, grad_weights, grad_first};
}

}  // namespace fastcompress::cuda
