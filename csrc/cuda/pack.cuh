// Packs rows of text and audio, one sample after another. Three kernels compute where each row goes, compute positions
// and labels, and copy the rows.
//
// Model, for T packed rows of D elements of E bytes: the copy reads and writes T D E bytes; the other kernels move some
// 50 bytes per row. One look-back gives each tile of the input the numbers of text rows and audios before it. These
// determine all target rows: a row of text follows all text rows and the rows of all audios before it.
#pragma once

#include "../pack.h"
#include "params.h"
#include "tile.cuh"

namespace fastcompress::cuda {

// The numbers of text rows and audios in one integer, for the look-back.
struct PackCount {
  static constexpr int kBits = 31;
  static __device__ int64_t of(int texts, int audios) { return int64_t(audios) << kBits | texts; }
  static __device__ int64_t texts(int64_t count) { return count & ((int64_t(1) << kBits) - 1); }
  static __device__ int64_t audios(int64_t count) { return count >> kBits; }
};

// Writes packed row t. Returns false if t is out of bounds, which happens only for invalid input.
__device__ inline bool put_row(const PackMapParams& p, int64_t t, int64_t source, int64_t index) {
  if (t < 0 || t >= p.bound) return false;
  p.source[t] = source;
  p.index[t] = index;
  return true;
}

// One thread per row of the input, one block per tile of kThreads rows.
static __global__ void __launch_bounds__(kThreads) pack_map_kernel(PackMapParams p) {
  __shared__ RowBits texts_shared, audios_shared;
  __shared__ int64_t tile_shared, before_shared;
  const int thread = int(threadIdx.x);
  wait_for_previous_launch();
  if (thread == 0) tile_shared = atomicAdd(&p.scratch.state->next_tile, 1u);
  __syncthreads();
  const int64_t tile = tile_shared, begin = tile * kThreads, row = begin + thread;
  const int64_t end = kThreads < p.rows - begin ? begin + kThreads : p.rows;
  RowPlace place;
  if (row < p.rows) place = place_row(p.sequences, p.row_group, row);
  const bool is_text = place.alive && place.group == kKeepRow;
  texts_shared.vote(thread, is_text);
  audios_shared.vote(thread, place.alive && !is_text && place.changes);
  __syncthreads();
  const RowBits texts = texts_shared, audios = audios_shared;
  const int64_t count = PackCount::of(texts.count(0, kThreads), audios.count(0, kThreads));
  if (thread == 0) publish_count(p.scratch, tile, count);
  if (thread < 32) {
    const int64_t before = look_back(p.scratch, tile, count, thread);
    if (thread == 0) before_shared = before;
  }
  __syncthreads();
  const int64_t texts_before = PackCount::texts(before_shared), audios_before = PackCount::audios(before_shared);

  // With invalid offsets all audios are dropped: using the offsets could leave rows unwritten.
  const bool wrong = p.scratch.state->wrong_audios != 0;
  const int64_t num_audios = wrong ? 0 : p.audios.count;
  auto audio_begin = [&](int64_t a) { return wrong ? 0 : p.audios.begin[a < num_audios ? a : num_audios]; };

  int error = 0;
  if (row < p.rows) {
    int64_t t = -1;
    if (is_text) {
      t = texts_before + texts.count(0, thread) + audio_begin(audios_before + audios.count(0, thread));
      int64_t index = row;
      if (p.ids != nullptr) {
        index = p.ids[row];
        if (index < 0 || index >= p.num_embeddings) {
          error |= kInvalidIds;
          index = -1;
        }
      }
      if (!put_row(p, t, row, index)) t = -1;
    }
    p.target[row] = t;
  }
  // Write the audios that start in the tile one after another, with one thread per row.
  for (int i = audios.first(0, kThreads), a = 0; i < kThreads; i = audios.first(i + 1, kThreads), ++a) {
    const int64_t audio = audios_before + a;
    if (audio >= num_audios) break;
    const int64_t first = texts_before + texts.count(0, i);
    for (int64_t k = audio_begin(audio) + thread; k < audio_begin(audio + 1); k += kThreads)
      p.target[p.rows + k] = put_row(p, first + k, p.rows + k, p.num_embeddings + k) ? first + k : -1;
  }
  // Write cu_seqlens of the sequences that end in rows (begin, end], as in write_cu_segments.
  auto packed_before = [&](int64_t stop) {
    const int rows = int((stop < end ? stop : end) - begin);
    const int64_t t = texts_before + texts.count(0, rows) + audio_begin(audios_before + audios.count(0, rows));
    return int32_t(t < p.bound ? t : p.bound);
  };
  const bool is_last = end == p.rows;
  const int64_t first_sequence = begin == 0 ? 0 : upper_bound(p.sequences.end, p.sequences.count, begin);
  const int64_t end_sequence = is_last ? p.sequences.count : upper_bound(p.sequences.end, p.sequences.count, end);
  if (begin == 0 && thread == 0) p.cu_seqlens[0] = 0;
  for (int64_t b = first_sequence + thread; b < end_sequence; b += kThreads)
    p.cu_seqlens[b + 1] = packed_before(p.sequences.end[b]);
  if (is_last) {
    const int64_t found = audios_before + audios.count(0, kThreads), used = audio_begin(found);
    const int64_t total = packed_before(p.rows);
    if (thread == 0) {
      if (wrong || found != num_audios) error |= kInvalidAudios;
      store_relaxed(&p.scratch.state->total, uint64_t(total) + 1);
    }
    for (int64_t k = used + thread; k < p.audios.rows; k += kThreads) p.target[p.rows + k] = -1;
    for (int64_t t = total + thread; t < p.bound; t += kThreads) p.source[t] = p.index[t] = -1;
  }
  if (error != 0) atomicOr(&p.scratch.state->error, int32_t(error));
}

// One thread per packed row.
static __global__ void __launch_bounds__(kThreads) pack_labels_kernel(PackLabelsParams p) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= p.count) return;
  int64_t low = 0, high = p.num_sequences;  // find the first sequence that ends after t
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  const bool inside = low < p.num_sequences;
  const int64_t position = inside ? t - p.cu_seqlens[low] : 0;
  p.position_ids[t] = position;
  if (p.labels == nullptr) return;
  p.packed_labels[t] = inside ? packed_label(p.source[t], position == 0, p.row_group, p.rows, p.labels) : kIgnoredLabel;
}

// Units of a row that a lane loads before it stores them.
constexpr int kPackUnroll = 4;

// One warp per row, one Unit per lane: 16 bytes if all rows are aligned to 16 bytes, else one element.
template <class Unit>
__global__ void __launch_bounds__(kThreads) pack_rows_kernel(PackRowsParams p) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= p.count) return;
  const int lane = int(threadIdx.x) % 32;
  const int64_t i = p.index[t], num_rows = p.rows.count, units = p.row_bytes / int64_t(sizeof(Unit));
  const char* row = nullptr;
  if (i >= 0 && i < num_rows)
    row = static_cast<const char*>(p.rows.data) + i * p.rows_stride_bytes;
  else if (i >= num_rows && i - num_rows < p.audio.count)
    row = static_cast<const char*>(p.audio.data) + (i - num_rows) * p.audio_stride_bytes;
  else if (i != -1 && p.error != nullptr && lane == 0)
    atomicOr(p.error, int32_t(kInvalidIds));
  const Unit* from = reinterpret_cast<const Unit*>(row);
  Unit* to = reinterpret_cast<Unit*>(static_cast<char*>(p.out) + t * p.row_bytes);
  for (int64_t first = lane; first < units; first += 32 * kPackUnroll) {
    Unit values[kPackUnroll];
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
      values[u] = Unit{};
      if (row != nullptr && first + 32 * u < units) values[u] = from[first + 32 * u];
    }
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u)
      if (first + 32 * u < units) to[first + 32 * u] = values[u];
  }
}

}  // namespace fastcompress::cuda
