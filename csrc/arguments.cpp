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

Rule make_rule(const std::string& rule, int64_t size, double threshold, double prominence, int64_t min_len,
               int64_t max_len, bool keep_tail) {
  RuleKind kind = RuleKind::kUniform;
  if (rule == "local-max")
    kind = RuleKind::kLocalMax;
  else if (rule == "threshold")
    kind = RuleKind::kThreshold;
  else
    STD_TORCH_CHECK(rule == "uniform", "unknown rule ", rule);
  STD_TORCH_CHECK(size >= 1 && min_len >= 1 && max_len >= 0, "rule: size and min_len must be at least 1");
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
