// Segments of frames that are alike on average: one frame after the other, all of a sequence by one thread.
//
// Model, for frames of D elements of E bytes: D E bytes a frame from memory, and as many again from the first-level
// cache, when it is added to the sum of its segment, which stays there, 4 D bytes read and 4 D written. 3 D
// multiplications and as many additions: scale and add, the product with the sum, the square. With AVX-512, one of each
// a cycle, that is 240 cycles for D = 1280, 70 ns at 3.5 GHz, and about 40 more to widen a half type twice; memory at
// 25 GB/s takes 205 ns in fp32, 102 in bf16. On top comes what nothing else of the sequence can be done in, from the
// last partial sum to the first of the next frame: two trees side by side, a root, a quotient, a comparison, about 100
// cycles. So fp32 waits for memory, half types for arithmetic. Taking the square one frame ahead, which hides the root
// and the quotient, was slower by 7 to 20 %: a third row to load and to widen (AMD EPYC 9004).
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "greedy_segments.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Where the segments of a sequence of at least one row start: 1, else 0.
template <class T>
void split(const T* x, int64_t stride, int64_t rows, int64_t width, const Linkage& linkage, accumulate_t<T>* total,
           uint8_t* starts) {
  const RowKernels<T>& kernels = row_kernels<T>();
  double inverse = inverse_norm(kernels.dot(x, x, width)), dot, square;
  int64_t length = 1;
  bool joins = false;
  starts[0] = 1;
  for (int64_t t = 1; t < rows; ++t) {
    kernels.extend(total, joins, accumulate_t<T>(inverse), x + t * stride, stride, width, &dot, &square);
    inverse = inverse_norm(square);
    joins = linkage.joins(dot, inverse, length);
    length = joins ? length + 1 : 1;
    starts[t] = !joins;
  }
}

}  // namespace

Tensor greedy_boundaries(Tensor x, OptionalTensor cu_seqlens, OptionalTensor lengths, double threshold,
                         int64_t max_len) {
  STD_TORCH_CHECK(max_len >= 0, "max_len must not be negative, got ", max_len);
  const Rows rows = read_rows(x);
  const Sequences sequences = read_sequences(x, x.dim() - 1, cu_seqlens, lengths);
  Tensor out =
      x.dim() == 3 ? empty_cpu({x.size(0), x.size(1)}, ScalarType::Bool) : empty_cpu({x.size(0)}, ScalarType::Bool);
  auto* starts = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Linkage linkage{1 - threshold, max_len};
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = accumulate_t<T>;
    const T* data = rows.data<T>();
    const int64_t num_sequences = sequences.count();
    const size_t bytes = std::max<size_t>(64, size_t(padded_width(rows.width)) * sizeof(S));
    std::atomic<bool> out_of_memory{false};
    // A thread takes the sequences that begin in its part of the rows, so that long and short ones are shared out.
    parallel(rows.count, rows.width * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      const auto& begin = sequences.begin;
      int64_t b = std::lower_bound(begin.begin(), begin.end(), first) - begin.begin();
      const std::unique_ptr<void, Free> total(std::aligned_alloc(64, bytes));
      if (total == nullptr) {
        out_of_memory = true;
        return;
      }
      for (; b < num_sequences && begin[b] < last; ++b) {
        const int64_t end = sequences.end[b], next = b + 1 < num_sequences ? begin[b + 1] : sequences.rows;
        if (begin[b] < end)
          split(data + begin[b] * rows.stride, rows.stride, end - begin[b], rows.width, linkage,
                static_cast<S*>(total.get()), starts + begin[b]);
        std::fill(starts + end, starts + next, 0);  // padding
      }
    });
    STD_TORCH_CHECK(!out_of_memory, "out of memory: ", bytes, " bytes for the sum of a segment");
  });
  return out;
}

}  // namespace fastcompress::cpu
