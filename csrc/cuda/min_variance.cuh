// Minimum-variance segments by dynamic programming, defined in fastcompress/reference/min_variance.py.
//
// The first kernel lists the blocks of up to kVarianceBlock rows. In the second, a thread block takes one after the
// other. best[k][t] is the smallest cost of k segments from row t to the end; all rows of one k are computed at once,
// kRows rows per thread, and only the values of the last k are kept. The length of the first segment of each state is
// kept as 3 or 4 bits, from which the path is read off at the end.
//
// Model, for a block of n rows, K segments of at most m rows: K steps of n m additions and comparisons in fp64, for
// which each thread keeps the costs of its rows in registers and reads kRows + m - 1 values of best. At m = 8 a warp
// executes 298 instructions per step (SASS of sm_90), 75 of them in fp64. With n = 1500 a step takes 745 cycles of
// issue if every row is computed; half of the states cannot be reached, and their warps skip the step. At K = 375 that
// predicts 70 to 140 us. Reading the path takes K reads from shared memory in sequence, and K / kChunk rounds of reads
// from global memory.
#pragma once

#include "params.h"
#include "tile.cuh"

namespace fastcompress::cuda {

// One thread per row. Clears the row's output; threads whose row starts a run list the blocks of the run.
static __global__ void __launch_bounds__(kThreads) find_variance_blocks_kernel(VarianceParams p) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  RowPlace place;
  if (row < p.rows) {
    p.starts[row] = 0;
    place = place_row(p.sequences, p.row_group, row);
  }
  const bool starts_run = place.alive && place.changes && place.group != kKeepRow;
  int64_t end = place.end;
  if (p.row_group != nullptr) {
    const int own_lane = int(threadIdx.x) % 32;
    for (unsigned left = __ballot_sync(~0u, starts_run); left != 0; left &= left - 1) {  // the warp finds each end
      const int lane = __ffs(int(left)) - 1;
      const int32_t group = __shfl_sync(~0u, place.group, lane);
      const int64_t last = __shfl_sync(~0u, place.end, lane);
      int64_t at = __shfl_sync(~0u, row, lane) + 1;
      for (unsigned others = 0; others == 0;) {
        const bool other = at + own_lane >= last || p.row_group[at + own_lane] != group;
        others = __ballot_sync(~0u, other);
        at += others == 0 ? 32 : __ffs(int(others)) - 1;
      }
      if (lane == own_lane) end = at;
    }
  }
  if (!starts_run) return;
  const int64_t count = (end - row + kVarianceBlock - 1) / kVarianceBlock;
  const int64_t first = atomicAdd(&p.state->next_tile, unsigned(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = row + i * kVarianceBlock, rest = end - begin;
    p.blocks[first + i] = {begin, rest < kVarianceBlock ? rest : kVarianceBlock};
  }
}

// Returns the next block for this thread block, or one without rows after the last. All threads must call this.
__device__ inline VarianceBlock take_block(const VarianceParams& p) {
  __shared__ unsigned taken;
  __syncthreads();  // all threads have read the one before
  if (threadIdx.x == 0) taken = atomicAdd(&p.state->next_clear, 1u);
  __syncthreads();
  return taken < p.state->next_tile ? p.blocks[taken] : VarianceBlock{0, 0};
}

// Sizes of a block, and the rows at which a number of segments to its end is possible.
struct VarianceSize {
  int rows, count, longest;

  __device__ VarianceSize(const VarianceBlock& block, double rate, int64_t max_len)
      : rows(int(block.rows)), count(int(ceil(double(block.rows) / rate))),
        longest(max_len < block.rows ? int(max_len) : int(block.rows)) {}
  __device__ int first_row(int segments) const {
    const int by_length = rows - segments * longest, by_count = count - segments;
    return by_length > by_count ? by_length : by_count;
  }
  __device__ int last_row(int segments) const {
    const int by_count = rows - segments, by_length = (count - segments) * longest;
    return by_length < by_count ? by_length : by_count;
  }
};

template <class S>
__device__ __forceinline__ double read_distance(const VarianceParams& p, int64_t row, int length) {
  const double distance = double(static_cast<const S*>(p.d)[row * p.window + length - 2]);
  return fabs(distance) <= kLargestDistance ? distance : 1.0;
}

// Threads, and the bits of a length, for segments of at most kLongest rows.
template <int kLongest>
struct VarianceShape;
template <>
struct VarianceShape<8> {  // an odd number of rows per thread: without bank conflicts
  static constexpr int kRows = 5, kVarianceThreads = 320, kBits = 3;
};
template <>
struct VarianceShape<12> {
  static constexpr int kRows = 3, kVarianceThreads = 512, kBits = 4;
};

// Segments of at most kLongest rows.
template <class S, int kLongest>
__global__ void __launch_bounds__(VarianceShape<kLongest>::kVarianceThreads) short_variance_kernel(VarianceParams p) {
  using Shape = VarianceShape<kLongest>;
  constexpr int kRows = Shape::kRows, kBits = Shape::kBits, kBlock = Shape::kVarianceThreads;
  constexpr int kChunk = 32, kChunkWords = kChunk * kLongest / kRows + 2;
  static_assert(kRows * kBits <= 16 && kBlock * kRows > kVarianceBlock && kLongest <= 1 << kBits);
  __shared__ double buffers[2][kBlock * kRows + kLongest];
  __shared__ uint16_t chunk[kChunk][kChunkWords];
  __shared__ int reached;
  const int thread = int(threadIdx.x), own = thread * kRows;
  auto* const choices = static_cast<uint16_t*>(p.scratch) + blockIdx.x * p.scratch_bytes / int64_t(sizeof(uint16_t));
  for (VarianceBlock block = take_block(p); block.rows > 0; block = take_block(p)) {
    const VarianceSize size(block, p.rate, p.max_len);
    double costs[kRows][kLongest], of_first[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      costs[r][0] = own + r < size.rows ? 0.0 : double(INFINITY);
      of_first[r] = 0;
      buffers[0][own + r] = 0;
    }
#pragma unroll
    for (int length = 2; length <= kLongest; ++length) {
      const double* pairs = buffers[length % 2];
      double* next = buffers[1 - length % 2];
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int t = own + r;
        costs[r][length - 1] = double(INFINITY);
        if (length > size.longest || t + length > size.rows) continue;
        of_first[r] = of_first[r] + read_distance<S>(p, block.begin + t, length);
        const double sum = pairs[t + 1] + of_first[r];
        next[t] = sum;
        costs[r][length - 1] = sum / double(length);
      }
    }
    __syncthreads();
    for (int t = thread; t < kBlock * kRows + kLongest; t += kBlock) {
      buffers[0][t] = t == size.rows ? 0.0 : double(INFINITY);
      buffers[1][t] = double(INFINITY);
    }
    __syncthreads();
    for (int k = 1; k <= size.count; ++k) {
      const double* after = buffers[(k - 1) % 2];
      double* now = buffers[k % 2];
      const int first = size.first_row(k), last = size.last_row(k);
      if (own <= last && own + kRows > first) {
        double least[kRows];
        unsigned word = 0;
#pragma unroll
        for (int i = 0; i < kRows + kLongest - 1; ++i) {  // in increasing length for each row
          const double rest = after[own + 1 + i];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (i < r || i - r >= kLongest) continue;
            const double sum = costs[r][i - r] + rest;
            if (i == r || sum < least[r]) {
              least[r] = sum;
              word = (word & ~(((1u << kBits) - 1) << r * kBits)) | unsigned(i - r) << r * kBits;
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          now[own + r] = own + r >= first && own + r <= last ? least[r] : double(INFINITY);
        choices[int64_t(k - 1) * kBlock + thread] = uint16_t(word);
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) now[own + r] = double(INFINITY);
      }
      __syncthreads();
    }
    int t = 0;
    if (thread == 0) p.starts[block.begin] = 1;
    for (int k = size.count; k > 1;) {
      const int steps = k - 1 < kChunk ? k - 1 : kChunk, first_word = t / kRows;
      const int words = kBlock - first_word < kChunkWords ? kBlock - first_word : kChunkWords;
      for (int i = thread; i < steps * words; i += kBlock)
        chunk[i / words][i % words] = choices[int64_t(k - 1 - i / words) * kBlock + first_word + i % words];
      __syncthreads();
      if (thread == 0) {
        for (int step = 0; step < steps; ++step) {
          const unsigned word = chunk[step][t / kRows - first_word];
          t += 1 + int(word >> t % kRows * kBits & ((1u << kBits) - 1));
          p.starts[block.begin + t] = 1;
        }
        reached = t;
      }
      __syncthreads();
      t = reached;
      k -= steps;
    }
  }
}

// Segments of any length: costs and choices are in global memory.
template <class S>
__global__ void __launch_bounds__(kLongThreads) long_variance_kernel(VarianceParams p) {
  __shared__ double buffers[2][2 * kVarianceBlock];
  auto* const costs = reinterpret_cast<double*>(static_cast<char*>(p.scratch) + blockIdx.x * p.scratch_bytes);
  const int thread = int(threadIdx.x);
  for (VarianceBlock block = take_block(p); block.rows > 0; block = take_block(p)) {
    const VarianceSize size(block, p.rate, p.max_len);
    auto* const choices = reinterpret_cast<uint16_t*>(costs + int64_t(size.longest) * size.rows);
    double* const of_first = buffers[1];  // a thread reads and writes only its own rows
    double* const pairs = of_first + kVarianceBlock;
    for (int t = thread; t < size.rows; t += kLongThreads) costs[t] = of_first[t] = pairs[t] = 0;
    for (int length = 2; length <= size.longest; ++length) {
      double* const next = length % 2 ? pairs : buffers[0];
      const double* const before = length % 2 ? buffers[0] : pairs;
      __syncthreads();
      for (int t = thread; t + length <= size.rows; t += kLongThreads) {
        of_first[t] = of_first[t] + read_distance<S>(p, block.begin + t, length);
        next[t] = before[t + 1] + of_first[t];
        costs[int64_t(length - 1) * size.rows + t] = next[t] / double(length);
      }
    }
    __syncthreads();
    for (int t = thread; t < 2 * kVarianceBlock; t += kLongThreads) {
      buffers[0][t] = t == size.rows ? 0.0 : double(INFINITY);
      buffers[1][t] = double(INFINITY);
    }
    __syncthreads();
    for (int k = 1; k <= size.count; ++k) {
      const double* after = buffers[(k - 1) % 2];
      double* now = buffers[k % 2];
      const int first = size.first_row(k), last = size.last_row(k);
      for (int t = thread; t <= size.rows; t += kLongThreads) {
        double least = double(INFINITY);
        int choice = 1;
        for (int length = 1; t >= first && t <= last && length <= size.longest && t + length <= size.rows; ++length) {
          const double sum = costs[int64_t(length - 1) * size.rows + t] + after[t + length];
          if (sum < least) {
            least = sum;
            choice = length;
          }
        }
        now[t] = least;
        if (t < size.rows) choices[int64_t(k - 1) * size.rows + t] = uint16_t(choice);
      }
      __syncthreads();
    }
    if (thread == 0) {
      int64_t t = 0;
      p.starts[block.begin] = 1;
      for (int k = size.count; k > 1; --k) {
        t += choices[int64_t(k - 1) * size.rows + t];
        p.starts[block.begin + t] = 1;
      }
    }
  }
}

}  // namespace fastcompress::cuda
