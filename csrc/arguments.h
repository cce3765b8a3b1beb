// Reads and checks arguments of ops, for all devices.
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

// Calls f with a value of the C++ type of `type`.
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

// The rows of x.reshape(-1, D). The elements of a row are contiguous; the rows are a constant stride apart.
struct Rows {
  Tensor tensor;  // owns the memory: x, or a contiguous copy of it
  int64_t count, width, stride;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};
Rows read_rows(const Tensor& x);

// Checks the arguments of min_variance_boundaries.
void check_min_variance(const Tensor& d, double rate, int64_t max_len);

// Returns the row groups, or null; `holder` keeps a contiguous copy alive.
const int32_t* read_row_group(const std::optional<Tensor>& row_group, int64_t rows, Tensor& holder);
// Returns `count` contiguous int64 values; int32 is converted.
Tensor read_int64(const char* name, const Tensor& tensor, int64_t count);
inline const int64_t* const_int64_data(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}
Rows read_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t width, ScalarType dtype);
// Returns `count` contiguous weights; they have the accumulation type of `dtype`, the dtype of the rows.
Tensor read_weights(const char* name, const Tensor& weights, int64_t count, ScalarType dtype);

int32_t shim_dtype(ScalarType dtype);
// Allocates a contiguous tensor. torch::stable::empty looks its operator up by name, which costs a microsecond.
Tensor empty_on(int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes, ScalarType dtype);

Rule make_rule(const std::string& rule, int64_t size, double threshold, double prominence, int64_t min_len,
               int64_t max_len, bool keep_tail);
// Rounds the threshold of a rule to the dtype of the distances, as PyTorch does in a comparison. Half-precision
// distances are then widened exactly to fp32.
void round_threshold(Rule& rule, ScalarType dtype);
// Upper bound of the number of segments: fastcompress.rules.max_segments.
int64_t max_segments(const Rule& rule, bool has_row_group, int64_t num_rows, int64_t num_sequences);
Reduce read_reduce(const std::string& reduce);

}  // namespace fastcompress
