// What the launchers take: raw pointers and sizes, free of torch.
#pragma once

#include <cstdint>

#include "../greedy_segments.h"
#include "../segment_reduce.h"
#include "../rule.h"

namespace fastcompress::cuda {

// Threads of a block of every kernel, and its segments where a warp takes one.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSegmentsPerBlock = kWarps;

// 0 or a cudaError_t.
using Error = int;
using Stream = void*;

enum class DType : int32_t { kFloat, kDouble, kBFloat16, kHalf };
inline int64_t size_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Rows of x.reshape(-1, D); `stride` counts elements.
struct RowsIn {
  const void* data;
  int64_t count, width, stride;
};

// A batch as the caller gave it. `values` is cu_seqlens [count + 1] with packed input, lengths [count] with padded
// input (then padded_length is positive or there is no row), or null.
struct BatchIn {
  const void* values;
  bool is_int64;
  int64_t count, padded_length, rows;
  bool padded;
};

// First and end row of each sequence, checked and in order, on the device.
struct Sequences {
  int64_t* begin;
  int64_t* end;
  int64_t count;
};

// What blocks tell each other and the host, cleared before each call.
struct State {
  int32_t error;       // what was wrong with the input, an Invalid
  uint32_t next_tile;  // tiles are numbered in the order in which blocks start, so that none waits for one that has not
  uint32_t next_clear;  // of the pieces of the rows behind the last segment
  uint64_t total;       // 1 + the number of segments, 0 as long as it is not known
};

enum Invalid : int32_t {
  kInvalidSequences = 1,
  kInvalidSegments = 2,
  kTooManySegments = 4,
  kInvalidIds = 8,
  kInvalidAudios = 16,  // offsets that do not fit, or more or fewer audios than places for them
};

// Segments that an op finds, and where they go.
struct SegmentsOut {
  int64_t* starts;
  int64_t* lengths;
  int32_t* cu_segments;
  int64_t bound;    // rows of starts, lengths and values
  bool clear_rest;  // write empty segments behind the last
};

// Scratch memory of an op that finds segments.
struct Scratch {
  State* state;
  uint64_t* tiles;  // what each tile has published for the look-back
  int64_t num_tiles;
};

// Segments that are given; checked on the device against `rows`.
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

struct GreedyParams {
  RowsIn x;
  Sequences sequences;
  Linkage linkage;
  double* inverse_norms;  // scratch, a value a row
  void* scratch;          // two rows of padded_width a sequence, in the accumulation type; null: in shared memory
  uint8_t* starts;        // a byte a row
};

struct SelectParams {
  const void* d;  // fp32 or fp64, a value a row
  int64_t rows;
  Sequences sequences;
  const int32_t* row_group;  // may be null
  Rule rule;
  uint8_t* flags;  // scratch, a byte a row
  SegmentsOut out;
  Scratch scratch;
};

struct ReduceParams {
  RowsIn x;  // of expand: the rows of the segments
  SegmentsIn segments;
  Reduce reduce;
  const void* weights;  // a value a row, or null
  RowsIn y;             // of the backward of max and of weights: what the forward gave
  RowsIn grad;          // likewise: the gradient of y
  void* out;
  void* grad_weights;
};

// Tokens that share the row in which one fires and the next is opened (fastcompress/reference/integrate_and_fire.py).
struct IntegrateParams {
  RowsIn x, grad;  // the gradient of the tokens: backward
  SegmentsIn tokens;
  const void* weights;   // a value a row
  const void* first;     // a value a token: the weight of its first row
  const void* divisors;  // a value a token, or null; forward
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
  const int64_t* ids;          // may be null
  const int64_t* audio_begin;  // [num_audios + 1]
  int64_t num_audios, num_audio_rows, num_embeddings;
  bool compact;
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

// ---- what host and device both ask of a rule ----

FASTCOMPRESS_HD inline bool needs_walk(const Rule& rule) {
  return rule.kind != RuleKind::kUniform && (rule.min_len > 1 || rule.max_len > 0);
}

// Rows before and behind a row that its boundary depends on.
FASTCOMPRESS_HD inline int64_t rows_behind(const Rule& rule) { return rule.lookahead(); }
FASTCOMPRESS_HD inline int64_t rows_before(const Rule& rule) {
  return rule.needs_distance() ? 1 + rule.lookahead() : 0;
}

// Rows behind the halo that are loaded along, so that most segments end before rows have to be fetched one window at a
// time.
constexpr int kExtraRows = 2;

}  // namespace fastcompress::cuda
