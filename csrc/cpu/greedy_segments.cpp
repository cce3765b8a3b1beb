// Greedy segmentation: a frame joins the current segment while its mean cosine to the segment's frames is high enough.
// One thread processes all frames of a sequence, one after another.
//
// Model, for frames of D elements of E bytes. Bytes per frame: D E from memory; D E again from the first-level cache,
// when the frame is added to the sum of its segment; and 4 D read and 4 D written for that sum, which stays in the
// cache. Operations per frame: 3 D multiplications and 3 D additions (scale and add to the sum, product with the sum,
// square). With AVX-512, at one of each per cycle, D = 1280 takes 240 cycles, which is 70 ns at 3.5 GHz, and about 40
// cycles more to widen a half type twice. Memory at 25 GB/s takes 205 ns in fp32 and 102 ns in bf16. In addition, about
// 100 cycles per frame cannot overlap with anything else of the sequence: two reduction trees in parallel, a square
// root, a division and a comparison, from the last partial sum of a frame to the first of the next. So fp32 is
// bandwidth bound and half types are bound by arithmetic. Computing the square one frame ahead hides the root and the
// division but was 7 to 20 % slower, because a third row must be loaded and widened (AMD EPYC 9004).
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

// Writes 1 for rows that start a segment and 0 for others, for a sequence of at least one row.
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
    // A thread takes the sequences that begin in its part of the rows, which balances long and short sequences.
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
