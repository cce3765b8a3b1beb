// The first launch of an op that finds segments: clears the state that its tiles share, and checks the batch. The
// blocks of the next kernel start meanwhile (device.h).
#pragma once

#include "device.h"
#include "params.h"
#include "tile.cuh"

namespace fastcompress::cuda {

__device__ inline int64_t read_index(const BatchIn& batch, int64_t i) {
  return batch.is_int64 ? static_cast<const int64_t*>(batch.values)[i] : static_cast<const int32_t*>(batch.values)[i];
}

// Block 0 checks the batch and the audios, and writes the sequences and the state; the other blocks clear the words of
// the tiles. An invalid batch sets the error flag and is replaced by one sequence of all rows followed by empty ones,
// so that later kernels stay inside their memory.
static __global__ void __launch_bounds__(kThreads)
    prepare_kernel(BatchIn batch, AudiosIn audios, Sequences sequences, Scratch scratch) {
  const int thread = int(threadIdx.x);
  allow_next_launch();
  if (blockIdx.x > 0) {
    const int64_t stride = int64_t(gridDim.x - 1) * kThreads;
    for (int64_t i = int64_t(blockIdx.x - 1) * kThreads + thread; i < scratch.num_tiles; i += stride)
      scratch.tiles[i] = 0;
    return;
  }
  bool wrong = false;
  for (int64_t b = thread; b < sequences.count && batch.values != nullptr; b += kThreads) {
    const int64_t value = read_index(batch, b);
    if (batch.padded) {
      wrong |= value < 0 || value > batch.padded_length;
    } else {
      const int64_t next = read_index(batch, b + 1);
      wrong |= value > next || (b == 0 && value != 0) || (b == sequences.count - 1 && next != batch.rows);
    }
  }
  if (batch.values != nullptr && !batch.padded && sequences.count == 0)
    wrong |= read_index(batch, 0) != 0 || batch.rows != 0;
  wrong = __syncthreads_or(wrong) != 0;
  bool wrong_audios = audios.begin != nullptr && audios.has_wrong_ends();
  for (int64_t a = thread; audios.begin != nullptr && a < audios.count; a += kThreads)
    wrong_audios |= audios.is_wrong(a);
  wrong_audios = __syncthreads_or(wrong_audios) != 0;
  for (int64_t b = thread; b < sequences.count; b += kThreads) {
    int64_t begin = b == 0 ? 0 : batch.rows, end = batch.rows;
    if (!wrong && batch.padded) {
      begin = b * batch.padded_length;
      end = begin + (batch.values == nullptr ? batch.padded_length : read_index(batch, b));
    } else if (!wrong && batch.values != nullptr) {
      begin = read_index(batch, b);
      end = read_index(batch, b + 1);
    }
    sequences.begin[b] = begin;
    sequences.end[b] = end;
  }
  if (thread == 0) *scratch.state = State{wrong ? int32_t(kInvalidSequences) : 0, int32_t(wrong_audios), 0, 0, 0};
}

}  // namespace fastcompress::cuda
