// Declares and registers the ops that each device implements. The signatures are those of
// fastcompress/dispatch/schemas.py.
#pragma once

#include <optional>
#include <tuple>

#include "arguments.h"

namespace fastcompress {

using OptionalTensor = std::optional<Tensor>;

// Raises unless all tensors of a call are on one device. Torch selects the implementation by one of the tensors, so a
// kernel could otherwise read memory of another device.
class OneDevice {
 public:
  void add(const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    const int32_t index = tensor.get_device_index();
    STD_TORCH_CHECK(type_ < 0 || (type == type_ && index == index_), "all tensors of an op must be on one device");
    type_ = type;
    index_ = index;
  }
  void add(const OptionalTensor& tensor) {
    if (tensor.has_value()) add(*tensor);
  }
  template <class Other>
  void add(const Other&) {}

 private:
  int32_t type_ = -1, index_ = -1;
};

// `OnOneDevice<&op>::call` checks the devices and calls the op.
template <auto op>
struct OnOneDevice;
template <class Result, class... Args, Result (*op)(Args...)>
struct OnOneDevice<op> {
  static Result call(Args... args) {
    OneDevice device;
    (device.add(args), ...);
    return op(args...);
  }
};

}  // namespace fastcompress

// clang-format off
#define FASTCOMPRESS_DECLARE_OPS                                                                                      \
Tensor adjacent_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t lag);                   \
Tensor banded_distance(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, int64_t window);                  \
Tensor min_variance_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths, OptionalTensor row_group, \
                               double rate, int64_t max_len);                                                         \
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

#define FASTCOMPRESS_REGISTER_OP(m, device, op)                                                                       \
  m.impl(#op, TORCH_BOX(&fastcompress::OnOneDevice<&fastcompress::device::op>::call))

// `device` is the namespace that declares the ops.
#define FASTCOMPRESS_REGISTER_OPS(m, device)                                                                          \
  FASTCOMPRESS_REGISTER_OP(m, device, adjacent_distance);                                                             \
  FASTCOMPRESS_REGISTER_OP(m, device, banded_distance);                                                               \
  FASTCOMPRESS_REGISTER_OP(m, device, min_variance_boundaries);                                                       \
  FASTCOMPRESS_REGISTER_OP(m, device, adjacent_distance_backward);                                                    \
  FASTCOMPRESS_REGISTER_OP(m, device, select_boundaries);                                                             \
  FASTCOMPRESS_REGISTER_OP(m, device, greedy_boundaries);                                                             \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_reduce);                                                                \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_max_backward);                                                          \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_weighted_mean);                                                         \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_weighted_mean_backward);                                                \
  FASTCOMPRESS_REGISTER_OP(m, device, integrate_rows);                                                                \
  FASTCOMPRESS_REGISTER_OP(m, device, integrate_rows_backward);                                                       \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_expand);                                                                \
  FASTCOMPRESS_REGISTER_OP(m, device, segment_pool);                                                                  \
  FASTCOMPRESS_REGISTER_OP(m, device, pack_map);                                                                      \
  FASTCOMPRESS_REGISTER_OP(m, device, pack_labels);                                                                   \
  FASTCOMPRESS_REGISTER_OP(m, device, pack_rows)
// clang-format on
