// The CPU implementations, with the signatures of fastcompress/schemas.py.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastcompress::cpu {

using OptionalTensor = std::optional<Tensor>;

Tensor adjacent_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t lag);
Tensor adjacent_distance_backward(Tensor grad, Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                  int64_t lag);
std::tuple<Tensor, Tensor, Tensor> select_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths,
                                                     OptionalTensor row_group, std::string rule, int64_t size,
                                                     double threshold, double prominence, int64_t min_len,
                                                     int64_t max_len, bool keep_tail, bool compact);
Tensor segment_reduce(Tensor x, Tensor starts, Tensor lengths, std::string reduce);
Tensor segment_max_backward(Tensor grad, Tensor x, Tensor y, Tensor starts, Tensor lengths);
Tensor segment_weighted_mean(Tensor x, Tensor weights, Tensor starts, Tensor lengths);
std::tuple<Tensor, Tensor> segment_weighted_mean_backward(Tensor grad, Tensor x, Tensor y, Tensor weights,
                                                          Tensor starts, Tensor lengths);
Tensor segment_expand(Tensor y, Tensor starts, Tensor lengths, int64_t num_rows, std::string reduce);
std::tuple<Tensor, Tensor, Tensor, Tensor> segment_pool(Tensor x, OptionalTensor keys, OptionalTensor cu_seqlens,
                                                        OptionalTensor lengths, OptionalTensor row_group,
                                                        std::string rule, int64_t size, double threshold,
                                                        double prominence, int64_t min_len, int64_t max_len,
                                                        bool keep_tail, bool compact);

}  // namespace fastcompress::cpu
