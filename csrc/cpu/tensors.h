// Shared by the CPU ops: sequences of a batch, lists of segments, output memory and threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#ifdef FASTCOMPRESS_STD_THREADS
#include <thread>
#endif

#include "arguments.h"
#include "row_kernels.h"

namespace fastcompress {

// First row and end of each sequence; checked to be in order and inside `rows`.
struct Sequences {
  std::vector<int64_t> begin, end;
  int64_t rows;  // rows of the tensor, including padding

  int64_t count() const { return int64_t(begin.size()); }
};
// `rows_dim` is the number of leading dimensions of `like` that index rows: 1 for packed input, 2 for padded input.
Sequences read_sequences(const Tensor& like, int64_t rows_dim, const std::optional<Tensor>& cu_seqlens,
                         const std::optional<Tensor>& lengths);

// Calls f(b, begin, end) for the parts of sequences that lie in rows [first, last).
template <class F>
void for_each_part(const Sequences& sequences, int64_t first, int64_t last, const F& f) {
  int64_t b = std::upper_bound(sequences.end.begin(), sequences.end.end(), first) - sequences.end.begin();
  for (; b < sequences.count() && sequences.begin[b] < last; ++b) {
    const int64_t begin = std::max(first, sequences.begin[b]), end = std::min(last, sequences.end[b]);
    if (begin < end) f(b, begin, end);
  }
}

// Segments that read_segments has checked.
struct CheckedSegments {
  Tensor starts, lengths;  // contiguous int64
  SegmentList list;

  SegmentList slice(int64_t begin, int64_t end) const {
    return {list.starts + begin, list.lengths + begin, end - begin};
  }
};
// Checks that segments are in order and inside `rows`. Each may share `shared` rows, 0 or 1, with the previous one, and
// must have at least that many.
CheckedSegments read_segments(const Tensor& starts, const Tensor& lengths, int64_t rows, int64_t shared = 0);

// Memory for output rows whose number is known only after they are written. The buffer has room for the upper bound;
// pages that are never written take no memory. Page faults of written pages cost more than the arithmetic of the ops,
// so large buffers ask for huge pages.
class OutputRows {
 public:
  OutputRows(int64_t max_rows, int64_t width, ScalarType dtype, size_t element_size);
  void* data() const { return memory_.get(); }
  // Returns the first `rows` rows as a tensor that holds at most a tenth more memory than they need.
  Tensor finish(int64_t rows);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  Tensor copy(int64_t rows) const;

  std::unique_ptr<void, Free> memory_;
  int64_t width_;
  ScalarType dtype_;
  size_t row_bytes_, bytes_;
};

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor int64_tensor(const int64_t* values, int64_t count, int64_t padded_count, int64_t padding);
// Converts offsets, which do not decrease, to int32; raises if they do not fit.
Tensor int32_tensor(const std::vector<int64_t>& values);

// Least work per thread in bytes, about 50 us of reading. With less, a second thread gains little, and it costs
// milliseconds if other processes occupy the cores.
constexpr int64_t kThreadBytes = 1 << 20;

// Calls f(begin, end) on torch's threads for parts of [0, count) of at least `grain`. f must not throw.
template <class F>
void on_threads(int64_t count, int64_t grain, const F& f) {
#ifdef FASTCOMPRESS_STD_THREADS  // for ThreadSanitizer, which does not see the synchronization of OpenMP
  const int64_t most = torch::stable::get_num_threads(), parts = std::max<int64_t>(1, std::min(most, count / grain));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i)
    threads.emplace_back([&f, i, parts, count] { f(count * i / parts, count * (i + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, count, grain, f);
#endif
}

// Calls f(begin, end) like on_threads, with a grain of kThreadBytes; `cost` is the number of bytes per item.
template <class F>
void parallel(int64_t count, int64_t cost, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kThreadBytes / std::max<int64_t>(1, cost));
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
  } else {
    on_threads(count, grain, f);
  }
}

}  // namespace fastcompress
