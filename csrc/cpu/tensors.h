// What the CPU ops share: element types, rows of a tensor, sequences of a batch, lists of segments, output memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "row_kernels.h"
#include "rule.h"

namespace fastcompress {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the element type.
template <class F>
void dispatch_dtype(const char* name, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    default: STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
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

// First row and end row of each sequence, checked: inside `rows`, in order.
struct Sequences {
  std::vector<int64_t> begin, end;
  int64_t rows;    // of the tensor, padding included
  int64_t frames;  // of the sequences

  int64_t count() const { return int64_t(begin.size()); }
};
// `rows_dim` is how many dimensions of `like` are rows: 1 for packed input, 2 for padded.
Sequences read_sequences(const Tensor& like, int64_t rows_dim, const std::optional<Tensor>& cu_seqlens,
                         const std::optional<Tensor>& lengths);

// Row groups, or null.
const int32_t* read_row_group(const std::optional<Tensor>& row_group, int64_t rows, Tensor& holder);

// Segments, checked: in order, without overlap, inside `rows`.
struct CheckedSegments {
  Tensor starts, lengths;  // contiguous int64
  SegmentList list;

  SegmentList slice(int64_t begin, int64_t end) const {
    return {list.starts + begin, list.lengths + begin, end - begin};
  }
};
CheckedSegments read_segments(const Tensor& starts, const Tensor& lengths, int64_t rows);

Rule make_rule(const std::string& rule, int64_t size, double threshold, double prominence, int64_t min_len,
               int64_t max_len, bool keep_tail);
// fastcompress.rules.max_segments
int64_t max_segments(const Rule& rule, bool has_row_group, const Sequences& sequences);
Reduce read_reduce(const std::string& reduce);

// Rows of output whose number becomes known while they are written: pages that were not written cost nothing. Those that
// were cost more than the arithmetic here, so large buffers ask for huge ones.
class OutputRows {
 public:
  OutputRows(int64_t max_rows, int64_t width, ScalarType dtype, size_t element_size);
  void* data() const { return memory_.get(); }
  // The first `rows` rows as a tensor of exactly that size.
  Tensor finish(int64_t rows);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t width_;
  ScalarType dtype_;
  size_t row_bytes_, bytes_;
};

// A contiguous tensor. torch::stable::empty looks its operator up by name, which costs a microsecond.
Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor int64_tensor(const int64_t* values, int64_t count, int64_t padded_count, int64_t padding);
Tensor int32_tensor(const std::vector<int64_t>& values);

// Work for one thread, about 50 us of reading: with less, a second one brings little, and costs milliseconds when other
// processes hold the cores.
constexpr int64_t kThreadBytes = 1 << 20;

// Calls f(begin, end) for parts of [0, count), each of about `cost` bytes times its length, on torch's threads. f must
// not throw.
template <class F>
void parallel(int64_t count, int64_t cost, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kThreadBytes / std::max<int64_t>(1, cost));
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace fastcompress
