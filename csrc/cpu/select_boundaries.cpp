// Segments from distances: one walk (rule.h) per sequence, on one thread, since it reads 4 or 8 bytes per row.
#include "ops.h"

namespace fastcompress::cpu {

std::tuple<Tensor, Tensor, Tensor> select_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                                     OptionalTensor row_group, std::string rule_name, int64_t size,
                                                     double threshold, double prominence, int64_t min_len,
                                                     int64_t max_len, bool keep_tail, bool compact) {
  Rule rule = make_rule(rule_name, size, threshold, prominence, min_len, max_len, keep_tail);
  STD_TORCH_CHECK(d.dim() == 1 || d.dim() == 2, "d must have shape [N] or [B, T]");
  const Sequences sequences = read_sequences(d, d.dim(), cu_seqlens, lengths);
  Tensor group_holder;
  const int32_t* row_group_data = read_row_group(row_group, sequences.rows, group_holder);
  round_threshold(rule, d.scalar_type());
  const bool is_double = d.scalar_type() == ScalarType::Double;
  const Tensor scores = torch::stable::contiguous(
      is_double || d.scalar_type() == ScalarType::Float ? d : torch::stable::to(d, ScalarType::Float));

  std::vector<int64_t> starts, segment_lengths, cu_segments{0};
  const int64_t bound = max_segments(rule, row_group.has_value(), sequences.rows, sequences.count());
  starts.reserve(bound);
  segment_lengths.reserve(bound);
  auto walk = [&](const auto* data) {
    for (int64_t b = 0; b < sequences.count(); ++b) {
      const int64_t begin = sequences.begin[b], end = sequences.end[b];
      Walk(begin).advance(rule, Scores<std::decay_t<decltype(*data)>>{data, row_group_data}, begin, end, end,
                          [&](int64_t start, int64_t length) {
                            starts.push_back(start);
                            segment_lengths.push_back(length);
                          });
      cu_segments.push_back(int64_t(starts.size()));
    }
  };
  if (is_double)
    walk(static_cast<const double*>(scores.const_data_ptr()));
  else
    walk(static_cast<const float*>(scores.const_data_ptr()));
  const int64_t count = int64_t(starts.size()), kept = compact ? count : bound;
  return {int64_tensor(starts.data(), count, kept, sequences.rows),
          int64_tensor(segment_lengths.data(), count, kept, 0), int32_tensor(cu_segments)};
}

}  // namespace fastcompress::cpu
