// Segmentation rules as a small state machine, shared by the CPU and CUDA sources. The definition in words and in
// Python is fastcompress/reference/select_boundaries.py.
//
// A walk visits the rows of a sequence from left to right and decides for each row whether it starts a segment. It can
// pause at any row, and resume once the distances that the next row needs are known; the CPU kernel does this at the
// end of each chunk. Kernels that evaluate all rows in parallel call wants_boundary directly.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace fastcompress {

enum class RuleKind : int32_t { kUniform, kLocalMax, kThreshold };

struct Rule {
  RuleKind kind;
  int64_t size;       // Uniform: frames per segment; LocalMax: order
  double threshold;   // rounded to the type of the distances before the comparison
  double prominence;  // LocalMax: least prominence of a peak; 0: no condition
  int64_t min_len;
  int64_t max_len;  // 0: no maximum
  bool keep_tail;   // Uniform: keep the last segment of a run even if it is short

  FASTCOMPRESS_HD bool needs_distance() const { return kind != RuleKind::kUniform; }
  // Number of distances after the one at a possible boundary that the decision reads.
  FASTCOMPRESS_HD int64_t lookahead() const { return kind == RuleKind::kLocalMax ? size : 0; }
};

// Row groups: rows of a negative group are dropped, a row of group 0 is a segment of its own, and rows of a positive
// group are pooled with neighbours of the same group. A run is a maximal range of rows of one positive group.
constexpr int32_t kKeepRow = 0;

// Distances of a batch, indexed by row: d[t] is the distance between rows t and t + 1. `row_group` may be null: then
// every sequence is one run.
template <class S>
struct Scores {
  const S* d;
  const int32_t* row_group;

  // Returns whether row t + 1 is in the run of row t; `end` is the end of t's sequence.
  FASTCOMPRESS_HD bool continues(int64_t t, int64_t end) const {
    return t + 1 < end && (row_group == nullptr || row_group[t + 1] == row_group[t]);
  }
};

// Returns whether d[t] is greater than the `order` distances on each side of it, as far as these are in the run that
// starts at row `run`. The first and the last distance of a run are not peaks. A comparison with NaN is false.
template <class S>
FASTCOMPRESS_HD bool is_peak(const Scores<S>& scores, int64_t t, int64_t run, int64_t end, int64_t order) {
  const S value = scores.d[t];
  if (t == run || !scores.continues(t + 1, end)) return false;
  for (int64_t s = t - 1; s >= run && t - s <= order; --s)
    if (!(value > scores.d[s])) return false;
  for (int64_t s = t + 1; scores.continues(s, end) && s - t <= order; ++s)
    if (!(value > scores.d[s])) return false;
  return true;
}

// Prominence of the peak at t, as scipy.signal.peak_prominences computes it: on each side take the lowest distance
// before a higher one (or the end of the run, or a NaN); the prominence is the peak's height above the higher of these
// two. Reads the whole run.
template <class S>
FASTCOMPRESS_HD double prominence(const Scores<S>& scores, int64_t t, int64_t run, int64_t end) {
  const S peak = scores.d[t];
  S left = peak, right = peak;
  for (int64_t s = t; s >= run && scores.d[s] <= peak; --s)
    if (scores.d[s] < left) left = scores.d[s];
  for (int64_t s = t; scores.continues(s, end) && scores.d[s] <= peak; ++s)
    if (scores.d[s] < right) right = scores.d[s];
  return double(peak) - double(left > right ? left : right);
}

// Returns whether the rule, without min_len and max_len, puts a boundary between row - 1 and `row`. Both rows are in
// the run that starts at row `run`, in the sequence that ends at `end`. Rows are independent of each other, so that all
// can be evaluated in parallel. Of `scores` it reads d[row - 1 - order] to d[row - 1 + order] and the groups of their
// rows; with a prominence, the whole run.
template <class S>
FASTCOMPRESS_HD bool wants_boundary(const Rule& rule, const Scores<S>& scores, int64_t row, int64_t run, int64_t end) {
  if (rule.kind == RuleKind::kUniform) return (row - run) % rule.size == 0;
  const int64_t t = row - 1;  // d[t] is the distance between the previous row and this one
  if (!(scores.d[t] > S(rule.threshold))) return false;
  if (rule.kind == RuleKind::kThreshold) return true;
  return is_peak(scores, t, run, end, rule.size) &&
         (rule.prominence <= 0 || prominence(scores, t, run, end) >= rule.prominence);
}

// State of the walk over one sequence. `emit(start, length)` is called for every segment, in order.
struct Walk {
  int64_t row = 0;       // next row to decide
  int64_t run = 0;       // first row of the current run
  int64_t segment = -1;  // first row of the open segment; -1: no segment is open

  FASTCOMPRESS_HD explicit Walk(int64_t begin = 0) : row(begin), run(begin) {}

  template <class S>
  FASTCOMPRESS_HD bool starts_segment(const Rule& rule, const Scores<S>& scores, int64_t end) const {
    const int64_t length = row - segment;
    if (length == rule.max_len) return true;
    return length >= rule.min_len && wants_boundary(rule, scores, row, run, end);
  }

  // Decides rows up to `end`, the end of the sequence, or until a row needs a distance that is not known yet: d[t] is
  // known for t + 1 < known. Returns whether the sequence is finished.
  template <class S, class Emit>
  FASTCOMPRESS_HD bool advance(const Rule& rule, const Scores<S>& scores, int64_t begin, int64_t end, int64_t known,
                               Emit&& emit) {
    for (; row < end; ++row) {
      // The decision on this row reads up to d[row - 1 + lookahead], which needs row + lookahead.
      const int64_t last = rule.lookahead() < end - 1 - row ? row + rule.lookahead() : end - 1;
      if (last >= known) return false;
      const int32_t group = scores.row_group == nullptr ? kKeepRow + 1 : scores.row_group[row];
      if (row == begin || group <= kKeepRow || (scores.row_group != nullptr && scores.row_group[row - 1] != group)) {
        close(rule, scores, emit);
        run = row;
        segment = group < kKeepRow ? -1 : row;
      } else if (starts_segment(rule, scores, end)) {
        close(rule, scores, emit);
        segment = row;
      }
    }
    close(rule, scores, emit);
    segment = -1;
    return true;
  }

 private:
  template <class S, class Emit>
  FASTCOMPRESS_HD void close(const Rule& rule, const Scores<S>& scores, Emit&& emit) const {
    if (segment < 0) return;
    const int64_t length = row - segment;
    const bool kept = scores.row_group != nullptr && scores.row_group[segment] == kKeepRow;
    if (rule.kind == RuleKind::kUniform && !rule.keep_tail && !kept && length < rule.size) return;
    emit(segment, length);
  }
};

}  // namespace fastcompress
