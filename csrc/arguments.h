// What the ops of every device read their arguments with.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "dtype.h"
#include "segment_reduce.h"
#include "rule.h"

namespace fastcompress {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the element type.
template <class F>
void dispatch_dtype(const char* name, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Half());
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows of x.reshape(-1, D), whose elements are contiguous and whose rows are a constant stride apart.
struct Rows {
  Tensor tensor;  // keeps a copy alive, where one had to be made
  int64_t count, width, stride;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};
Rows read_rows(const Tensor& x);

// Row groups, or null; `holder` keeps a contiguous copy alive.
const int32_t* read_row_group(const std::optional<Tensor>& row_group, int64_t rows, Tensor& holder);
// `count` integers, int32 widened, contiguous.
Tensor read_int64(const char* name, const Tensor& tensor, int64_t count);
inline const int64_t* const_int64_data(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}
Rows read_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t width, ScalarType dtype);
// `count` weights of rows of a dtype, contiguous.
Tensor read_weights(const char* name, const Tensor& weights, int64_t count, ScalarType dtype);

int32_t shim_dtype(ScalarType dtype);
// A contiguous tensor. torch::stable::empty looks its operator up by name, which costs a microsecond.
Tensor empty_on(int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes, ScalarType dtype);

Rule make_rule(const std::string& rule, int64_t size, double threshold, double prominence, int64_t min_len,
               int64_t max_len, bool keep_tail);
// Distances are fp32 or fp64; what else a caller has is widened exactly, and so is the threshold, rounded to their
// dtype.
void round_threshold(Rule& rule, ScalarType dtype);
// fastcompress.rules.max_segments
int64_t max_segments(const Rule& rule, bool has_row_group, int64_t num_rows, int64_t num_sequences);
Reduce read_reduce(const std::string& reduce);

}  // namespace fastcompress
