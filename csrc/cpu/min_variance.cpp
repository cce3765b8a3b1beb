// Minimum-variance segments by dynamic programming, defined in fastcompress/reference/min_variance.py.
//
// Model, for a block of n rows, K segments and a longest segment of m rows: best[k][t], the smallest cost of k segments
// from row t to the end, is m additions and m minima. A state can be reached if the rows after t fit into k segments
// and those before it into K - k, which is half of the K n states at n = 4 K and m = 8. For n = 1500 these are 2.2
// million additions of two doubles from cache, for each of which SSE2 loads two vectors: 1.1 million cycles or 0.2 us
// per row at 3.5 GHz. All values of best are kept, so that the path is read off without a table of choices.
#include <cmath>
#include <limits>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../min_variance.h"
#include "ops.h"

namespace fastcompress::cpu {
namespace {

constexpr int64_t kStep = 8;  // values of best that are computed at once
constexpr double kInfinity = std::numeric_limits<double>::infinity();

typedef double Pair __attribute__((vector_size(2 * sizeof(double))));

Pair load(const double* p) {
  Pair v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

Pair smaller(Pair a, Pair b) {
#ifdef __SSE2__  // gcc does not make this instruction of a comparison, and takes twice as long
  return _mm_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// Finds the segments of one block. Its buffers are used again for the next block of the same thread.
class Block {
 public:
  explicit Block(int64_t max_len) : max_len_(max_len) {}

  // Writes 1 to starts[t] for rows that start a segment; other values are left. Row t of `d` begins at d + t * window.
  template <class S>
  void split(const S* d, int64_t window, int64_t rows, int64_t count, uint8_t* starts) {
    rows_ = rows;
    count_ = count;
    longest_ = std::min(max_len_, rows);
    stride_ = rows + longest_ + kStep;
    compute_costs(d, window);
    compute_best();
    follow(starts);
  }

 private:
  double* costs(int64_t length) { return costs_.data() + (length - 1) * stride_; }
  double* best(int64_t segments) { return best_.get() + segments * stride_; }
  // Rows t at which `segments` segments to the end are possible, with the rest of the count before t.
  int64_t first_row(int64_t segments) const {
    return std::max(rows_ - std::min(segments * longest_, rows_), count_ - segments);
  }
  int64_t last_row(int64_t segments) const { return std::min(rows_ - segments, (count_ - segments) * longest_); }

  template <class S>
  void compute_costs(const S* d, int64_t window) {
    costs_.assign(longest_ * stride_, kInfinity);
    of_first_.assign(rows_, 0);
    pairs_.assign(rows_, 0);
    std::fill(costs(1), costs(1) + rows_, 0.0);
    for (int64_t length = 2; length <= longest_; ++length) {
      for (int64_t t = 0; t + length <= rows_; ++t) {
        const double distance = d[t * window + length - 2];
        of_first_[t] += std::abs(distance) <= kLargestDistance ? distance : 1;
        pairs_[t] = pairs_[t + 1] + of_first_[t];
        costs(length)[t] = pairs_[t] / double(length);
      }
    }
  }

  void compute_best() {
    if (const int64_t wanted = (count_ + 1) * stride_; wanted > best_size_) {
      best_.reset(new double[wanted]);  // not initialized: half of it is never written
      best_size_ = wanted;
    }
    std::fill(best(0), best(1), kInfinity);
    best(0)[rows_] = 0;
    for (int64_t k = 1; k <= count_; ++k) {
      const int64_t first = first_row(k), last = last_row(k);
      const double* after = best(k - 1);
      double* now = best(k);
      for (int64_t t = first; t <= last; t += kStep) {
        constexpr int64_t kPairs = kStep / 2;
        Pair least[kPairs];
        for (int64_t j = 0; j < kPairs; ++j) least[j] = load(costs(1) + t + 2 * j) + load(after + t + 1 + 2 * j);
        for (int64_t length = 2; length <= longest_; ++length)
#pragma GCC unroll 4
          for (int64_t j = 0; j < kPairs; ++j)
            least[j] = smaller(load(costs(length) + t + 2 * j) + load(after + t + length + 2 * j), least[j]);
        __builtin_memcpy(now + t, least, sizeof least);
      }
      // What the next step reads outside [first, last] belongs to no segmentation into `count_` segments.
      std::fill(now + std::max<int64_t>(0, first - longest_), now + first, kInfinity);
      std::fill(now + last + 1, now + std::min(last + 1 + longest_ + kStep, stride_), kInfinity);
    }
  }

  void follow(uint8_t* starts) {
    int64_t t = 0;
    starts[0] = 1;
    for (int64_t k = count_; k > 1; --k) {
      for (int64_t length = 1; length <= longest_; ++length) {
        const int64_t next = t + length;
        if (next < first_row(k - 1) || next > last_row(k - 1)) continue;
        if (costs(length)[t] + best(k - 1)[next] == best(k)[t]) {
          t = next;
          break;
        }
      }
      starts[t] = 1;
    }
  }

  int64_t max_len_, rows_ = 0, count_ = 0, longest_ = 0, stride_ = 0, best_size_ = 0;
  std::vector<double> costs_, of_first_, pairs_;
  std::unique_ptr<double[]> best_;
};

struct Range {
  int64_t begin, end;
};

// Returns the blocks of all runs: sequences, or runs of rows of one positive group.
std::vector<Range> find_blocks(const Sequences& sequences, const int32_t* row_group) {
  std::vector<Range> blocks;
  for (int64_t b = 0; b < sequences.count(); ++b) {
    const int64_t end = sequences.end[b];
    for (int64_t first = sequences.begin[b], last; first < end; first = last) {
      last = end;
      if (row_group != nullptr)
        for (last = first + 1; last < end && row_group[last] == row_group[first];) ++last;
      if (row_group != nullptr && row_group[first] <= 0) continue;
      for (int64_t begin = first; begin < last; begin += kVarianceBlock)
        blocks.push_back({begin, std::min(begin + kVarianceBlock, last)});
    }
  }
  return blocks;
}

}  // namespace

Tensor min_variance_boundaries(Tensor d, OptionalTensor cu_seqlens, OptionalTensor lengths, OptionalTensor row_group,
                               double rate, int64_t max_len) {
  check_min_variance(d, rate, max_len);
  const int64_t window = d.size(d.dim() - 1);
  const Sequences sequences = read_sequences(d, d.dim() - 1, cu_seqlens, lengths);
  Tensor group_holder;
  const int32_t* row_group_data = read_row_group(row_group, sequences.rows, group_holder);
  const bool is_double = d.scalar_type() == ScalarType::Double;
  const Tensor distances = torch::stable::contiguous(
      is_double || d.scalar_type() == ScalarType::Float ? d : torch::stable::to(d, ScalarType::Float));
  Tensor out =
      d.dim() == 3 ? empty_cpu({d.size(0), d.size(1)}, ScalarType::Bool) : empty_cpu({d.size(0)}, ScalarType::Bool);
  auto* starts = static_cast<uint8_t*>(out.mutable_data_ptr());
  std::fill(starts, starts + sequences.rows, 0);
  const std::vector<Range> blocks = find_blocks(sequences, row_group_data);
  auto split = [&](const auto* data) {
    // A block costs about as much as reading its number of states.
    parallel(int64_t(blocks.size()), kVarianceBlock * kVarianceBlock, [&](int64_t first, int64_t last) {
      Block block(max_len);
      for (int64_t i = first; i < last; ++i) {
        const auto [begin, end] = blocks[i];
        block.split(data + begin * window, window, end - begin, int64_t(std::ceil(double(end - begin) / rate)),
                    starts + begin);
      }
    });
  };
  if (is_double)
    split(static_cast<const double*>(distances.const_data_ptr()));
  else
    split(static_cast<const float*>(distances.const_data_ptr()));
  return out;
}

}  // namespace fastcompress::cpu
