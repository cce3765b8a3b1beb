// Integrate-and-fire: each token is a weighted sum of consecutive rows, and neighbouring tokens share the row in which
// the first one fires. Also computes the gradients. There are no atomics: one thread writes each output element, with
// one order of operations.
//
// Model, for x [N, D] of E-byte elements and M tokens: forward reads N D E bytes, and the shared rows again from the
// second-level cache, and writes M D E. Backward reads N D E and, for each row, its tokens' gradients, M D E of memory,
// and writes N D E.
#pragma once

#include "given.cuh"

namespace fastcompress::cuda {

// Rows that a token may share with the previous token, and the least number of rows of a token.
constexpr int64_t kShared = 1;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) integrate_rows_fwd_kernel(IntegrateParams p) {
  using S = accumulate_t<T>;
  const SegmentThread at;
  const int column = at.column<T>(), width = int(p.x.width);
  if (at.m >= p.tokens.count || column >= width) return;
  const Segment token = read_segment(p.tokens, at.m, kShared);
  T* out = static_cast<T*>(p.out) + at.m * width;
  if (token.length == 0) {
    store_vector<T, kAligned>(out, column, width, zero_vector<T>());
    return;
  }
  const S* weights = static_cast<const S*>(p.weights) + token.start;
  const S first = static_cast<const S*>(p.first)[at.m];
  S total[kVector<T>];
  const GlobalColumn<T, kAligned> rows{row_of<T>(p.x, token.start) + column, p.x.stride, width - column};
  auto weigh = [&](int64_t i, const Vector<T>& vector, S(&row)[kVector<T>]) {
    widen_vector<T>(vector, row);
    const S weight = i == 0 ? first : weights[i];
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) row[k] = row[k] * weight;
  };
  ordered_sum<T>(token.length, rows, weigh, Add<S>(), total);
  if (p.divisors != nullptr) {
    const S divisor = static_cast<const S*>(p.divisors)[at.m];
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) total[k] = total[k] / divisor;
  }
  store_vector<T, kAligned>(out, column, width, narrow_vector<T>(total));
}

// Returns the first token that starts at `row` or after it; terminates for any starts.
__device__ inline int64_t first_token(const SegmentsIn& tokens, int64_t row) {
  int64_t low = 0, high = tokens.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (tokens.starts[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One group of lanes per row, followed by one per token for the gradient of the token's first weight. With c the token
// that contains row t but does not start there:
// grad_x[t] = weights[t] * grad[c] + sum of first[m] * grad[m] over the tokens m that start at t.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) integrate_rows_bwd_kernel(IntegrateParams p) {
  using S = accumulate_t<T>;
  const GroupLane<kVector<T>> at(int(threadIdx.x % 32));
  constexpr int kGroups = 32 / kGroupLanes<T>;
  const int64_t item = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kGroups + at.group;
  const int64_t rows = p.tokens.rows;
  const int width = int(p.x.width);
  const bool is_row = item < rows, is_token = !is_row && item < rows + p.tokens.count;
  // The gradient of a weight is the dot product of row t and grad[m]. Groups without one use the first row and token.
  int64_t t = is_row ? item : 0, m = 0, next = 0;
  bool wanted = false;
  if (is_row) {
    next = first_token(p.tokens, t);
    wanted = next > 0 && segment_end(p.tokens, next - 1) > t;
    m = wanted ? next - 1 : 0;
  } else if (is_token) {
    const Segment token = read_segment(p.tokens, item - rows, kShared);
    wanted = token.length > 0;
    t = token.start;
    m = item - rows;
  }
  double slope = 0;
  if (rows > 0 && p.tokens.count > 0)  // uniform over the warp, as the shuffles require
    slope = group_dot<T, kAligned>(row_of<T>(p.grad, m), row_of<T>(p.x, t), width, at);
  if (is_token && at.lane == 0) static_cast<S*>(p.grad_first)[m] = wanted ? S(slope) : S(0);
  if (!is_row) return;
  if (at.lane == 0) static_cast<S*>(p.grad_weights)[t] = wanted ? S(slope) : S(0);
  const S weight = static_cast<const S*>(p.weights)[t];
  const S* first = static_cast<const S*>(p.first);
  for (int k = at.column(); k < width; k += kLanes) {
    S sum[kVector<T>] = {};
    if (wanted) {
      widen_vector<T>(load_vector<T, kAligned>(row_of<T>(p.grad, m), k, width), sum);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum[i] = weight * sum[i];
    }
    bool empty = !wanted;
    for (int64_t opened = next; opened < p.tokens.count && p.tokens.starts[opened] == t; ++opened) {
      S term[kVector<T>];
      widen_vector<T>(load_vector<T, kAligned>(row_of<T>(p.grad, opened), k, width), term);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        term[i] = first[opened] * term[i];
        sum[i] = empty ? term[i] : sum[i] + term[i];
      }
      empty = false;
    }
    store_vector<T, kAligned>(static_cast<T*>(p.out) + t * width, k, width, narrow_vector<T>(sum));
  }
}

}  // namespace fastcompress::cuda
