// Parameters of the launchers and kernels: raw pointers and sizes, without torch.
#pragma once

#include <cstdint>

#include "../greedy_segments.h"
#include "../min_variance.h"
#include "../segment_reduce.h"
#include "../rule.h"

namespace fastcompress::cuda {

// Threads per block of every kernel, and segments per block where a warp processes one segment.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSegmentsPerBlock = kWarps;

// 0 or a cudaError_t.
using Error = int;
using Stream = void*;

enum class DType : int32_t { kFloat, kDouble, kBFloat16, kHalf };
inline int64_t size_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Rows of x.reshape(-1, D); `stride` is in elements.
struct RowsIn {
  const void* data;
  int64_t count, width, stride;
};

// Returns whether all rows can be read and written 16 bytes at a time. The data may be null.
inline bool is_aligned(const RowsIn& rows, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * element_size % 16 == 0 &&
         rows.width * element_size % 16 == 0;
}
inline bool is_aligned(const void* data, int64_t width, int64_t element_size) {
  return is_aligned(RowsIn{data, 0, width, width}, element_size);
}

// A batch as the caller passed it, unchecked. `values` is cu_seqlens [count + 1] of packed input, lengths [count] of
// padded input (then padded_length is positive or there is no row), or null.
struct BatchIn {
  const void* values;
  bool is_int64;
  int64_t count, padded_length, rows;
  bool padded;
};

// Offsets of audios in the rows of `audio`, as the caller passed them.
struct AudiosIn {
  const int64_t* begin;  // [count + 1], or null: the op has no audios
  int64_t count, rows;
  bool exact;  // the last offset must equal `rows`, and may not just be less

  // Returns whether audio a has no valid rows.
  FASTCOMPRESS_HD bool is_wrong(int64_t a) const { return begin[a] > begin[a + 1]; }
  FASTCOMPRESS_HD bool has_wrong_ends() const {
    return begin[0] != 0 || (exact ? begin[count] != rows : begin[count] > rows);
  }
};

// First row and end of each sequence, checked and in order, on the device.
struct Sequences {
  int64_t* begin;
  int64_t* end;
  int64_t count;
};

// State that blocks share with each other and the host; cleared before each call.
struct State {
  int32_t error;         // errors of the input, bits of Invalid
  int32_t wrong_audios;  // the offsets of the audios are invalid
  // The next tile to process. Blocks take tiles in the order in which they start, so no block waits for a tile whose
  // block has not started. Minimum-variance segments count the blocks of rows that they have found here.
  uint32_t next_tile;
  // The next piece of the rows after the last segment to clear, or the next block of rows to search.
  uint32_t next_clear;
  uint64_t total;  // 1 + the number of segments; 0 while it is unknown
};

enum Invalid : int32_t {
  kInvalidSequences = 1,
  kInvalidSegments = 2,
  kTooManySegments = 4,
  kInvalidIds = 8,
  kInvalidAudios = 16,  // offsets of audios are invalid, or do not match the audios in row_group
};

// Output of an op that finds segments.
struct SegmentsOut {
  int64_t* starts;
  int64_t* lengths;
  int32_t* cu_segments;
  int64_t bound;    // rows of starts, lengths and values
  bool clear_rest;  // write empty segments after the last one
};

// Scratch memory of an op that finds segments.
struct Scratch {
  State* state;
  uint64_t* tiles;  // one word per tile for the look-back (tile.cuh)
  int64_t num_tiles;
};

// Segments that the caller passed; kernels check them against `rows`.
struct SegmentsIn {
  const int64_t* starts;
  const int64_t* lengths;
  int64_t count, rows;
  int32_t* error;  // may be null
};

struct DistanceParams {
  RowsIn x;
  Sequences sequences;
  int64_t lag;
  const void* grad;  // backward
  void* out;         // distances [rows], or the gradient of x [rows, width]
};

struct BandParams {
  RowsIn x;
  Sequences sequences;
  int64_t window, lags;  // lags: those that can have a partner, at most the window
  double* dots;          // scratch, [rows, lags + 1]: the square of each row, and its dot products with the next rows
  void* out;             // distances, [rows, window]
};

struct GreedyParams {
  RowsIn x;
  Sequences sequences;
  Linkage linkage;
  double* inverse_norms;  // scratch, one value per row
  void* scratch;    // two rows of padded_width per sequence, in the accumulation type; null: they are in shared memory
  uint8_t* starts;  // output, one byte per row: 1 where a segment starts
};

struct SelectParams {
  const void* d;  // distances, fp32 or fp64, one per row
  int64_t rows;
  Sequences sequences;
  const int32_t* row_group;  // may be null
  Rule rule;
  uint8_t* flags;  // scratch, one byte per row
  SegmentsOut out;
  Scratch scratch;
};

constexpr int kLongThreads = 512;  // threads per block of the kernel for long segments

struct VarianceBlock {
  int64_t begin, rows;
};

struct VarianceParams {
  const void* d;  // distances to the following rows, fp32 or fp64, [rows, window]
  int64_t window, rows;
  Sequences sequences;
  const int32_t* row_group;  // may be null
  double rate;
  int64_t max_len;
  int64_t bound;          // most blocks that the sequences can have
  VarianceBlock* blocks;  // scratch, `bound` blocks
  State* state;           // next_tile: number of blocks found; next_clear: number of blocks taken
  int64_t thread_blocks;  // of the search
  void* scratch;
  int64_t scratch_bytes;  // per thread block of the search
  uint8_t* starts;        // output, one byte per row: 1 where a segment starts
};

struct ReduceParams {
  RowsIn x;  // for expand: one row per segment
  SegmentsIn segments;
  Reduce reduce;
  const void* weights;  // one per row, or null
  RowsIn y;             // output of the forward, for the gradients of max and weighted mean
  RowsIn grad;          // gradient of y, for the same
  void* out;
  void* grad_weights;
};

// Tokens of integrate-and-fire. A token that fires shares that row with the next token
// (fastcompress/reference/integrate_and_fire.py).
struct IntegrateParams {
  RowsIn x, grad;  // grad: gradient of the tokens, for the backward
  SegmentsIn tokens;
  const void* weights;   // one per row
  const void* first;     // one per token: the weight of its first row
  const void* divisors;  // one per token, or null; for the forward
  void* out;             // tokens, or the gradient of x
  void* grad_weights;
  void* grad_first;
};

struct PoolParams {
  RowsIn x, keys;
  Sequences sequences;
  const int32_t* row_group;  // may be null
  Rule rule;
  SegmentsOut out;
  void* values;
  Scratch scratch;
  int tile_rows;
  int pitch;  // bytes between staged rows
};

struct PackMapParams {
  Sequences sequences;
  int64_t rows;
  const int32_t* row_group;
  const int64_t* ids;  // may be null
  AudiosIn audios;
  int64_t num_embeddings;
  int64_t* index;   // [bound]
  int64_t* source;  // [bound]
  int64_t* target;  // [rows + num_audio_rows]
  int32_t* cu_seqlens;
  int64_t bound;
  Scratch scratch;
};

struct PackLabelsParams {
  const int64_t* source;
  int64_t count;
  const int32_t* cu_seqlens;
  int64_t num_sequences;
  const int32_t* row_group;
  int64_t rows;
  const int64_t* labels;  // may be null
  int64_t* position_ids;
  int64_t* packed_labels;
};

struct PackRowsParams {
  RowsIn rows, audio;
  int64_t rows_stride_bytes, audio_stride_bytes, row_bytes;
  const int64_t* index;
  int64_t count;
  void* out;
  int32_t* error;  // may be null
};

// ---- properties of a rule, for host and device ----

FASTCOMPRESS_HD inline bool needs_walk(const Rule& rule) {
  return rule.kind != RuleKind::kUniform && (rule.min_len > 1 || rule.max_len > 0);
}

// Number of rows after and before a row on which its boundary depends.
FASTCOMPRESS_HD inline int64_t rows_after(const Rule& rule) { return rule.lookahead(); }
FASTCOMPRESS_HD inline int64_t rows_before(const Rule& rule) {
  return rule.needs_distance() ? 1 + rule.lookahead() : 0;
}

// Rows after the halo that are loaded as well. With them most segments end inside the loaded rows, and the block does
// not have to decide another window.
constexpr int kExtraRows = 2;
// Rows that a block loads besides those of its tile.
FASTCOMPRESS_HD inline int64_t pool_halo(const Rule& rule) {
  return rows_before(rule) + rows_after(rule) + (rule.needs_distance() ? kExtraRows : 0);
}

}  // namespace fastcompress::cuda
