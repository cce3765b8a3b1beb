// Shared by the kernels that find segments. One block processes a tile of consecutive rows, with one thread per row.
// Bitmasks in shared memory hold one bit per row: whether it starts or stops a segment. A decoupled look-back over the
// tiles (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016) gives each tile the
// number of segments before it.
#pragma once

#include "device.h"
#include "params.h"

namespace fastcompress::cuda {

// A bitmask of up to kThreads rows. No index of `words` is computed at run time, so that a copy can be in registers.
struct RowBits {
  unsigned words[kWarps];

  // Sets one bit per thread by warp ballots. All threads of the block must call this, and a barrier must follow.
  __device__ void vote(int thread, bool bit) {
    const unsigned word = __ballot_sync(~0u, bit);
    if (thread % 32 == 0) words[thread / 32] = word;
  }
  // Returns a word with only the bits in [from, to) kept; `word_first` is the index of its first bit.
  static __device__ unsigned masked(unsigned word, int word_first, int from, int to) {
    const int low = from - word_first, high = to - word_first;
    if (high <= 0 || low >= 32) return 0;
    if (low > 0) word &= ~0u << low;
    if (high < 32) word &= ~(~0u << high);
    return word;
  }
  __device__ int count(int from, int to) const {
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += __popc(masked(words[w], 32 * w, from, to));
    return total;
  }
  // Returns the first set bit in [from, to), or `to`.
  __device__ int first(int from, int to) const {
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      if (const unsigned word = masked(words[w], 32 * w, from, to)) return 32 * w + __ffs(int(word)) - 1;
    return to;
  }
  // Returns the last set bit in [0, to), or -1.
  __device__ int last(int to) const {
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w)
      if (const unsigned word = masked(words[w], 32 * w, 0, to)) return 32 * w + 31 - __clz(int(word));
    return -1;
  }
};

// Returns the first index in [0, count) whose value is greater than `value`, or count; `values` is in ascending order.
__device__ inline int64_t upper_bound(const int64_t* values, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] > value)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The sequence and the group of a row.
struct RowPlace {
  bool alive = false;    // the row is in a sequence and not dropped by its group
  bool changes = false;  // the row starts a run or is in no run, so it always stops the previous segment
  int32_t group = kKeepRow + 1;
  int64_t sequence = 0;        // index of the first sequence that ends after the row
  int64_t begin = 0, end = 0;  // first row and end of the row's sequence
};

__device__ inline RowPlace place_row(const Sequences& sequences, const int32_t* row_group, int64_t row) {
  RowPlace place;
  const int64_t b = upper_bound(sequences.end, sequences.count, row);
  const bool inside = b < sequences.count && sequences.begin[b] <= row;
  if (inside) {
    place.begin = sequences.begin[b];
    place.end = sequences.end[b];
    if (row_group != nullptr) place.group = row_group[row];
  }
  place.sequence = b;
  place.alive = inside && place.group >= kKeepRow;
  place.changes = !place.alive || row == place.begin || place.group == kKeepRow ||
                  (row_group != nullptr && row_group[row - 1] != place.group);
  return place;
}

// Returns whether the segment of a Uniform rule that starts at `row` has rule.size frames.
__device__ inline bool is_whole(const Rule& rule, const RowPlace& place, const int32_t* row_group, int64_t row) {
  if (rule.size > place.end - row) return false;
  for (int64_t r = row + 1; row_group != nullptr && r < row + rule.size; ++r)
    if (row_group[r] != place.group) return false;
  return true;
}

// Returns whether a row that stops a segment also starts one: dropped rows and short tails of Uniform do not.
__device__ inline bool starts_segment(const Rule& rule, const RowPlace& place, const int32_t* row_group, int64_t row) {
  if (!place.alive) return false;
  const bool drops_short = rule.kind == RuleKind::kUniform && !rule.keep_tail && place.group != kKeepRow;
  return !drops_short || is_whole(rule, place, row_group, row);
}

// ---- look-back ----

// A published word has a count in the upper 62 bits and one of these states in the lower 2: the count is that of the
// tile alone, or includes all tiles before it. The word 0 means that nothing is published.
constexpr uint64_t kOwnCount = 1, kCountSoFar = 2;

// Publishes the number of segments that start in this tile. One thread calls this as early as possible.
__device__ inline void publish_count(const Scratch& scratch, int64_t tile, int64_t count) {
  store_relaxed(scratch.tiles + tile, uint64_t(count) << 2 | (tile == 0 ? kCountSoFar : kOwnCount));
}

// Returns the number of segments before `tile`, which has published its own `count`, and publishes the total so far.
// All lanes of one warp call this.
__device__ inline int64_t look_back(const Scratch& scratch, int64_t tile, int64_t count, int lane) {
  if (tile == 0) return 0;
  int64_t before = 0;
  for (int64_t nearest = tile - 1;; nearest -= 32) {  // 32 tiles at a time; lane 0 reads the nearest
    uint64_t word = kCountSoFar;                      // lanes before the first tile: a count of 0
    if (nearest >= lane) {
      while ((word = load_relaxed(scratch.tiles + (nearest - lane))) == 0) __nanosleep(40);
    }
    const unsigned so_far = __ballot_sync(~0u, (word & 3) == kCountSoFar);
    const int last = so_far == 0 ? 31 : __ffs(int(so_far)) - 1;  // the nearest tile with a total so far
    int64_t sum = lane <= last ? int64_t(word >> 2) : 0;
#pragma unroll
    for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(~0u, sum, with);
    before += sum;
    if (so_far != 0) break;
  }
  if (lane == 0) store_relaxed(scratch.tiles + tile, uint64_t(before + count) << 2 | kCountSoFar);
  return before;
}

// Writes cu_segments of the sequences that end in rows (first, last]. All threads of the block call this. `sequence` is
// the first sequence that ends after row `first`, and `before` the number of segments before the tile; the starts of
// its rows are the bits from `first_bit` on. The first tile also writes the sequences that end at row 0, and the last
// tile all remaining ones.
__device__ inline void write_cu_segments(const SegmentsOut& out, const Sequences& sequences, int64_t sequence,
                                         const RowBits& starts, int first_bit, int64_t first, int64_t last,
                                         bool is_last, int64_t before, int thread) {
  if (first == 0 && thread == 0) out.cu_segments[0] = 0;
  for (int64_t b = (first == 0 ? 0 : sequence) + thread; b < sequences.count; b += kThreads) {
    const int64_t sequence_end = sequences.end[b];
    if (sequence_end > last && !is_last) break;
    const int64_t rows = (sequence_end < last ? sequence_end : last) - first;
    out.cu_segments[b + 1] = int32_t(before + starts.count(first_bit, first_bit + int(rows)));
  }
}

}  // namespace fastcompress::cuda
