// Fused segment pooling: one pass over x, in chunks that stay in the second-level cache between scoring and averaging.
//
// One thread processes a chunk. It computes the distances of the chunk's rows, waits until the previous chunk passes on
// the walk (rule.h), decides rows as far as the known distances allow, passes the walk on, and averages the segments
// that it closed directly into the output. Scoring and averaging of different chunks overlap; only the walk, over
// scalars, runs in order. Every distance and every sum has one order of operations, for any chunks and threads.
//
// Model, for x [N, D] of E-byte elements and M segments: x is read from memory once (row c - 1 of a chunk at c and the
// head of a segment that crosses chunks again, from cache), M * D * E bytes are written, 4 N + 16 M bytes are scratch.
// Arithmetic: 2 multiplications and 2 additions per element to score, 1 addition to average, and D / L divisions of
// vectors of L lanes per segment.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "adjacent_distance.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

// Bytes of x per chunk, a quarter of the 1 MiB second-level cache; 128 to 384 KiB differ by less than the noise (AMD
// EPYC 9004).
constexpr int64_t kChunkBytes = 256 << 10;

// Prefetch distance while a chunk is averaged, in chunks of the same thread. On 11,333 x 1280 in fp32, one thread, same
// machine: 4.5 ms with 1.25, 4.9 ms with 1, 5.1 ms without prefetch. bf16 shows no difference.
constexpr double kChunksAhead = 1.25;

// State of the walk between two chunks.
struct Progress {
  int64_t sequence = 0;
  Walk walk;
  int64_t segments = 0;
};

// Handover of the walk to one chunk; aligned to a cache line so that waiting threads do not share one.
struct alignas(64) Turn {
  std::atomic<bool> ready{false};
  Progress progress;
};

void wait_for(const std::atomic<bool>& flag) {
  for (int spins = 0; !flag.load(std::memory_order_acquire); ++spins)
    if (spins > 4096) std::this_thread::yield();
}

template <class T>
class Pool {
  using S = accumulate_t<T>;

 public:
  Pool(const Rows& x, const Rows& keys, const Sequences& sequences, const Rule& rule, const int32_t* row_group, T* out,
       int64_t* starts, int64_t* lengths, int64_t* cu_segments)
      : x_(x), keys_(keys), sequences_(sequences), rule_(rule), row_group_(row_group), out_(out), starts_(starts),
        lengths_(lengths), cu_segments_(cu_segments) {
    if (rule.needs_distance()) d_.reset(new S[std::max<int64_t>(1, sequences.rows)]);
    const int64_t row_bytes = std::max<int64_t>(1, x.width * int64_t(sizeof(T)));
    chunk_rows_ = std::max<int64_t>(16, kChunkBytes / row_bytes);
    num_chunks_ = std::max<int64_t>(1, (sequences.rows + chunk_rows_ - 1) / chunk_rows_);
    turns_.reset(new Turn[num_chunks_ + 1]);
    Progress& first = turns_[0].progress;
    if (sequences.count() > 0) first.walk = Walk(sequences.begin[0]);
    turns_[0].ready.store(true, std::memory_order_relaxed);
  }

  // Returns the number of segments.
  int64_t run() {
    const int64_t worth = num_chunks_ * kChunkBytes / kThreadBytes;
    threads_ = std::max<int64_t>(1, std::min<int64_t>(worth, torch::stable::get_num_threads()));
    if (threads_ <= 1) {
      work();
    } else {
      // Threads take chunks in order, so the chunk that a thread waits for is always held by a running thread.
      on_threads(threads_, 1, [this](int64_t, int64_t) { work(); });
    }
    return turns_[num_chunks_].progress.segments;
  }

 private:
  void work() {
    const int64_t rows_ahead = int64_t(kChunksAhead * double(threads_ * chunk_rows_));
    for (int64_t c; (c = next_chunk_.fetch_add(1, std::memory_order_relaxed)) < num_chunks_;) {
      const int64_t begin = c * chunk_rows_, end = std::min(begin + chunk_rows_, sequences_.rows);
      if (rule_.needs_distance()) score_rows(begin, end);
      wait_for(turns_[c].ready);
      const int64_t done = turns_[c].progress.segments;
      Turn& next = turns_[c + 1];
      next.progress = turns_[c].progress;
      decide(next.progress, end);
      const int64_t segments = next.progress.segments;
      next.ready.store(true, std::memory_order_release);
      row_kernels<T>().reduce(x_.data<T>(), x_.stride, nullptr, {starts_ + done, lengths_ + done, segments - done},
                              x_.width, Reduce::kMean, rows_ahead, out_ + done * x_.width);
    }
  }

  // Computes the distances between the rows [begin, end), and between row begin - 1 and row begin.
  void score_rows(int64_t begin, int64_t end) {
    int64_t b = std::upper_bound(sequences_.end.begin(), sequences_.end.end(), begin) - sequences_.end.begin();
    for (; b < sequences_.count() && sequences_.begin[b] < end; ++b) {
      const int64_t first = std::max(sequences_.begin[b], begin - 1), last = std::min(sequences_.end[b], end);
      if (last - first < 2) continue;
      score_keys(first, last - first);
    }
  }

  void score_keys(int64_t first, int64_t rows) {
    score(keys_.data<T>() + first * keys_.stride, keys_.stride, rows, keys_.width, d_.get() + first, 1);
  }

  void decide(Progress& p, int64_t known) {
    const Scores<S> scores{d_.get(), row_group_};
    auto emit = [&](int64_t start, int64_t length) {
      starts_[p.segments] = start;
      lengths_[p.segments] = length;
      ++p.segments;
    };
    while (p.sequence < sequences_.count()) {
      const int64_t begin = sequences_.begin[p.sequence], end = sequences_.end[p.sequence];
      if (!p.walk.advance(rule_, scores, begin, end, known, emit)) return;
      cu_segments_[++p.sequence] = p.segments;
      if (p.sequence < sequences_.count()) p.walk = Walk(sequences_.begin[p.sequence]);
    }
  }

  const Rows& x_;
  const Rows& keys_;
  const Sequences& sequences_;
  const Rule& rule_;
  const int32_t* row_group_;
  T* out_;
  int64_t* starts_;
  int64_t* lengths_;
  int64_t* cu_segments_;
  std::unique_ptr<S[]> d_;
  std::unique_ptr<Turn[]> turns_;
  int64_t chunk_rows_, num_chunks_, threads_ = 1;
  std::atomic<int64_t> next_chunk_{0};
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> segment_pool(Tensor x, OptionalTensor keys, OptionalTensor cu_seqlens,
                                                        OptionalTensor lengths, OptionalTensor row_group,
                                                        std::string rule_name, int64_t size, double threshold,
                                                        double prominence, int64_t min_len, int64_t max_len,
                                                        bool keep_tail, bool compact) {
  const Rule rule = make_rule(rule_name, size, threshold, prominence, min_len, max_len, keep_tail);
  STD_TORCH_CHECK(rule.prominence <= 0, "segment_pool does not compute prominences");
  const Rows rows = read_rows(x);
  const Sequences sequences = read_sequences(x, x.dim() - 1, cu_seqlens, lengths);
  Tensor group_holder;
  const int32_t* row_group_data = read_row_group(row_group, sequences.rows, group_holder);
  Rows key_rows = rows;
  if (keys.has_value()) {
    key_rows = read_rows(*keys);
    STD_TORCH_CHECK(key_rows.count == rows.count, "keys must have the number of rows of x, ", rows.count, ", got ",
                    key_rows.count);
    STD_TORCH_CHECK(keys->scalar_type() == x.scalar_type(), "keys must have the dtype of x");
  }
  const int64_t bound = max_segments(rule, row_group.has_value(), sequences.rows, sequences.count());
  std::unique_ptr<int64_t[]> starts(new int64_t[bound + 1]), segment_lengths(new int64_t[bound + 1]);
  std::vector<int64_t> cu_segments(sequences.count() + 1);
  int64_t count = 0, kept = 0;
  Tensor values;
  dispatch_dtype("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    OutputRows out(bound, rows.width, x.scalar_type(), sizeof(T));
    auto* data = static_cast<T*>(out.data());
    Pool<T> pool(rows, key_rows, sequences, rule, row_group_data, data, starts.get(), segment_lengths.get(),
                 cu_segments.data());
    count = pool.run();
    kept = compact ? count : bound;
    std::memset(static_cast<void*>(data + count * rows.width), 0, size_t(kept - count) * rows.width * sizeof(T));
    values = out.finish(kept);
  });
  return {values, int64_tensor(starts.get(), count, kept, sequences.rows),
          int64_tensor(segment_lengths.get(), count, kept, 0), int32_tensor(cu_segments)};
}

}  // namespace fastcompress::cpu
