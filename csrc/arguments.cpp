// Reads and checks arguments of ops; see arguments.h.
#include "arguments.h"

#include <algorithm>

namespace fastcompress {

Rows read_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x must have shape [N, D] or [B, T, D]");
  const int64_t last = x.dim() - 1;
  const int64_t count = last == 2 ? x.size(0) * x.size(1) : x.size(0);
  const bool even_rows = last == 1 || x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
  if (even_rows && (x.stride(last) == 1 || x.size(last) <= 1)) return {x, count, x.size(last), x.stride(last - 1)};
  return {torch::stable::contiguous(x), count, x.size(last), x.size(last)};
}

void check_min_variance(const Tensor& d, double rate, int64_t max_len) {
  STD_TORCH_CHECK(rate >= 1 && rate <= double(max_len), "rate must be between 1 and max_len, ", max_len, ", got ",
                  rate);
  STD_TORCH_CHECK(d.dim() == 2 || d.dim() == 3, "d must have shape [N, window] or [B, T, window]");
  const int64_t window = d.size(d.dim() - 1);
  STD_TORCH_CHECK(window >= max_len - 1, "d must have max_len - 1 = ", max_len - 1, " distances per row, got ", window);
}

const int32_t* read_row_group(const std::optional<Tensor>& row_group, int64_t rows, Tensor& holder) {
  if (!row_group.has_value()) return nullptr;
  STD_TORCH_CHECK(row_group->scalar_type() == ScalarType::Int, "row_group must be int32");
  STD_TORCH_CHECK(row_group->numel() == rows, "row_group must have one value per row, ", rows, ", got ",
                  row_group->numel());
  holder = torch::stable::contiguous(*row_group);
  return static_cast<const int32_t*>(holder.const_data_ptr());
}

Tensor read_int64(const char* name, const Tensor& tensor, int64_t count) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64");
  STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " values, got ", tensor.numel());
  return torch::stable::contiguous(type == ScalarType::Long ? tensor : torch::stable::to(tensor, ScalarType::Long));
}

Rows read_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t width, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width && tensor.scalar_type() == dtype, name,
      " must have shape [", rows, ", ", width, "] and the dtype of x");
  return read_rows(tensor);
}

Tensor read_weights(const char* name, const Tensor& weights, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == count && weights.scalar_type() == accumulate_type(dtype),
                  name, " must have shape [", count, "] and the accumulation dtype of x");
  return torch::stable::contiguous(weights);
}

int32_t shim_dtype(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

Tensor empty_on(int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[3] = {1, 1, 1};
  STD_TORCH_CHECK(sizes.size() <= 3, "too many dimensions");
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes.begin()[i]);
  AtenTensorHandle handle;
  const auto failed = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, shim_dtype(dtype),
                                               device_type, device_index, &handle);
  if (failed) {  // torch's C functions do not return torch's error message
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "cannot allocate a tensor of shape [", shape,
                    "]: the device is out of memory, or an earlier call on it failed");
  }
  return Tensor(handle);
}

Rule make_rule(const std::string& rule, int64_t size, double threshold, double prominence, int64_t min_len,
               int64_t max_len, bool keep_tail) {
  RuleKind kind = RuleKind::kUniform;
  if (rule == "local-max")
    kind = RuleKind::kLocalMax;
  else if (rule == "threshold")
    kind = RuleKind::kThreshold;
  else
    STD_TORCH_CHECK(rule == "uniform", "unknown rule ", rule);
  STD_TORCH_CHECK(size >= 1 && min_len >= 1, "rule: size and min_len must be at least 1, got ", size, " and ", min_len);
  STD_TORCH_CHECK(max_len >= 0, "rule: max_len must not be negative, got ", max_len);
  // Otherwise there could be more segments than max_segments returns.
  STD_TORCH_CHECK(max_len == 0 || min_len <= max_len, "rule: min_len must not exceed max_len, got ", min_len, " > ",
                  max_len);
  STD_TORCH_CHECK(kind != RuleKind::kUniform || (min_len == 1 && max_len == 0),
                  "rule: uniform takes neither min_len nor max_len");
  return {kind, size, threshold, prominence, min_len, max_len, keep_tail};
}

void round_threshold(Rule& rule, ScalarType dtype) {
  dispatch_dtype("d", dtype, [&](auto rounded) {
    narrow(accumulate_t<decltype(rounded)>(rule.threshold), rounded);
    rule.threshold = double(widen(rounded));
  });
}

int64_t max_segments(const Rule& rule, bool has_row_group, int64_t num_rows, int64_t num_sequences) {
  if (has_row_group) return num_rows;
  if (rule.kind == RuleKind::kUniform) return num_rows / rule.size + num_sequences;
  const bool no_neighbours = rule.kind == RuleKind::kLocalMax && (rule.max_len == 0 || rule.max_len >= 3);
  const int64_t shortest = no_neighbours ? std::max<int64_t>(2, rule.min_len) : rule.min_len;
  return num_rows / shortest + num_sequences;
}

Reduce read_reduce(const std::string& reduce) {
  if (reduce == "mean") return Reduce::kMean;
  if (reduce == "sum") return Reduce::kSum;
  if (reduce == "max") return Reduce::kMax;
  if (reduce == "first") return Reduce::kFirst;
  if (reduce == "last") return Reduce::kLast;
  STD_TORCH_CHECK(reduce == "middle", "unknown reduction ", reduce);
  return Reduce::kMiddle;
}

}  // namespace fastcompress
