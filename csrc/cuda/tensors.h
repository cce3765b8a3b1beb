// Shared by the host code of the CUDA ops: allocation, dtypes, streams and errors.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../arguments.h"
#include "launch.h"

namespace fastcompress::cuda {

// Widest rows: the y dimension of a grid, which indexes blocks of columns, is limited to 16 bits.
constexpr int64_t kMaxWidth = int64_t(1) << 21;

inline void check(Error error, const char* what) {
  STD_TORCH_CHECK(error == 0, "fastcompress: ", what, ": ", error_text(error));
}

// With FASTCOMPRESS_CHECK=1 every call waits for its kernel and raises if the kernel found invalid input, unless a CUDA
// graph captures the stream.
inline bool checks_at_once(Stream stream) {
  const char* value = std::getenv("FASTCOMPRESS_CHECK");
  return value != nullptr && std::strcmp(value, "1") == 0 && !is_capturing(stream);
}

// Makes the device of a tensor the current one while it exists, and holds the current stream of that device.
struct Scope {
  explicit Scope(const Tensor& like)
      : guard(enter_device(like.get_device_index())), stream(current_stream(like.get_device_index())) {}
  std::shared_ptr<void> guard;
  Stream stream;
};

inline Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return empty_on(device_type, like.get_device_index(), sizes, dtype);
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

inline RowsIn rows_in(const Rows& rows) {
  STD_TORCH_CHECK(rows.width <= kMaxWidth, "rows must not be wider than ", kMaxWidth, ", got ", rows.width);
  return {rows.tensor.const_data_ptr(), rows.count, rows.width, rows.stride};
}

// A flag that a kernel sets if an index is invalid; null unless the call checks at once.
class ErrorFlag {
 public:
  ErrorFlag(const Tensor& like, Stream stream) {
    if (!checks_at_once(stream)) return;
    flag_ = torch::stable::fill_(empty_like(like, {1}, ScalarType::Int), 0);
    data = static_cast<int32_t*>(flag_.mutable_data_ptr());
  }

  // Waits for the stream and returns whether the flag was set.
  bool read(Stream stream) const {
    if (data == nullptr) return false;
    int32_t error;
    check(read_back(&error, data, sizeof error, stream), "reading the error");
    return error != 0;
  }

  int32_t* data = nullptr;

 private:
  Tensor flag_;
};

}  // namespace fastcompress::cuda
