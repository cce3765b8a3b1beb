// What the CPU ops share: sequences of a batch, lists of segments, output memory, threads.
#pragma once

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

// First row and end row of each sequence, checked: inside `rows`, in order.
struct Sequences {
  std::vector<int64_t> begin, end;
  int64_t rows;  // of the tensor, padding included

  int64_t count() const { return int64_t(begin.size()); }
};
// `rows_dim` is how many dimensions of `like` are rows: 1 for packed input, 2 for padded.
Sequences read_sequences(const Tensor& like, int64_t rows_dim, const std::optional<Tensor>& cu_seqlens,
                         const std::optional<Tensor>& lengths);

// Segments, checked.
struct CheckedSegments {
  Tensor starts, lengths;  // contiguous int64
  SegmentList list;

  SegmentList slice(int64_t begin, int64_t end) const {
    return {list.starts + begin, list.lengths + begin, end - begin};
  }
};
// In order, inside `rows`; each may share `shared` rows, 0 or 1, with the one before, and has at least as many.
CheckedSegments read_segments(const Tensor& starts, const Tensor& lengths, int64_t rows, int64_t shared = 0);

// Rows of output whose number becomes known while they are written: pages that were not written cost nothing. Those
// that were cost more than the arithmetic here, so large buffers ask for huge ones.
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

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor int64_tensor(const int64_t* values, int64_t count, int64_t padded_count, int64_t padding);
// Of offsets, which do not decrease.
Tensor int32_tensor(const std::vector<int64_t>& values);

// Work for one thread, about 50 us of reading: with less, a second one brings little, and costs milliseconds when other
// processes hold the cores.
constexpr int64_t kThreadBytes = 1 << 20;

// Calls f(begin, end) for parts of [0, count) of at least `grain`, on torch's threads. f must not throw.
template <class F>
void on_threads(int64_t count, int64_t grain, const F& f) {
#ifdef FASTCOMPRESS_STD_THREADS  // of builds for ThreadSanitizer, which does not see what OpenMP's threads wait for
  const int64_t most = torch::stable::get_num_threads(), parts = std::max<int64_t>(1, std::min(most, count / grain));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i)
    threads.emplace_back([&f, i, parts, count] { f(count * i / parts, count * (i + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, count, grain, f);
#endif
}

// The same, for parts each of about `cost` bytes times its length.
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
