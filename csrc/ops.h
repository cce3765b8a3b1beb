// The ops of a device, with the signatures of fastcompress/schemas.py: what implements them, and how they are
// registered.
#pragma once

#include <optional>
#include <tuple>

#include "arguments.h"

namespace fastcompress {

using OptionalTensor = std::optional<Tensor>;

}  // namespace fastcompress

// clang-format off
#define FASTCOMPRESS_DECLARE_OPS                                                                                      \
Tensor adjacent_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t lag);                   \
Tensor adjacent_distance_backward(Tensor grad, Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths,           \
                                  int64_t lag);                                                                       \
std::tuple<Tensor, Tensor, Tensor> select_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths,     \
                                                     OptionalTensor row_group, std::string rule, int64_t size,        \
                                                     double threshold, double prominence, int64_t min_len,            \
                                                     int64_t max_len, bool keep_tail, bool compact);                  \
Tensor greedy_boundaries(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, double threshold,              \
                         int64_t max_len);                                                                            \
Tensor segment_reduce(Tensor x, Tensor starts, Tensor lengths, std::string reduce);                                   \
Tensor segment_max_backward(Tensor grad, Tensor x, Tensor y, Tensor starts, Tensor lengths);                          \
Tensor segment_weighted_mean(Tensor x, Tensor weights, Tensor starts, Tensor lengths);                                \
std::tuple<Tensor, Tensor> segment_weighted_mean_backward(Tensor grad, Tensor x, Tensor y, Tensor weights,            \
                                                          Tensor starts, Tensor lengths);                             \
Tensor integrate_rows(Tensor x, Tensor weights, Tensor first, OptionalTensor divisors, Tensor starts,                 \
                      Tensor lengths);                                                                                \
std::tuple<Tensor, Tensor, Tensor> integrate_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor first,       \
                                                           Tensor starts, Tensor lengths);                            \
Tensor segment_expand(Tensor y, Tensor starts, Tensor lengths, int64_t num_rows, std::string reduce);                 \
std::tuple<Tensor, Tensor, Tensor, Tensor> segment_pool(Tensor x, OptionalTensor keys, OptionalTensor cu_seqlens,     \
                                                        OptionalTensor lengths, OptionalTensor row_group,             \
                                                        std::string rule, int64_t size, double threshold,             \
                                                        double prominence, int64_t min_len, int64_t max_len,          \
                                                        bool keep_tail, bool compact);                                \
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_map(Tensor row_group, OptionalTensor ids, OptionalTensor cu_seqlens,  \
                                                    OptionalTensor lengths, Tensor audio_cu_seqlens,                  \
                                                    int64_t num_embeddings, int64_t num_audio_rows, bool compact);    \
std::tuple<Tensor, Tensor> pack_labels(Tensor source, Tensor cu_seqlens, Tensor row_group, OptionalTensor labels);    \
Tensor pack_rows(Tensor rows, Tensor audio, Tensor index, Tensor target, bool is_table);

// `device`: the namespace that declares them.
#define FASTCOMPRESS_REGISTER_OPS(m, device)                                                                          \
  m.impl("adjacent_distance", TORCH_BOX(&fastcompress::device::adjacent_distance));                                   \
  m.impl("adjacent_distance_backward", TORCH_BOX(&fastcompress::device::adjacent_distance_backward));                 \
  m.impl("select_boundaries", TORCH_BOX(&fastcompress::device::select_boundaries));                                   \
  m.impl("greedy_boundaries", TORCH_BOX(&fastcompress::device::greedy_boundaries));                                   \
  m.impl("segment_reduce", TORCH_BOX(&fastcompress::device::segment_reduce));                                         \
  m.impl("segment_max_backward", TORCH_BOX(&fastcompress::device::segment_max_backward));                             \
  m.impl("segment_weighted_mean", TORCH_BOX(&fastcompress::device::segment_weighted_mean));                           \
  m.impl("segment_weighted_mean_backward", TORCH_BOX(&fastcompress::device::segment_weighted_mean_backward));         \
  m.impl("integrate_rows", TORCH_BOX(&fastcompress::device::integrate_rows));                                         \
  m.impl("integrate_rows_backward", TORCH_BOX(&fastcompress::device::integrate_rows_backward));                       \
  m.impl("segment_expand", TORCH_BOX(&fastcompress::device::segment_expand));                                         \
  m.impl("segment_pool", TORCH_BOX(&fastcompress::device::segment_pool));                                             \
  m.impl("pack_map", TORCH_BOX(&fastcompress::device::pack_map));                                                     \
  m.impl("pack_labels", TORCH_BOX(&fastcompress::device::pack_labels));                                               \
  m.impl("pack_rows", TORCH_BOX(&fastcompress::device::pack_rows))
// clang-format on
