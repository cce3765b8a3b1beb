// Launches the kernels of prepare.cuh and select_boundaries.cuh.
#include <algorithm>

#include "dispatch.h"
#include "launch.h"
#include "prepare.cuh"
#include "select_boundaries.cuh"

namespace fastcompress::cuda {
namespace {

dim3 rows_grid(int64_t rows) { return dim3(unsigned((rows + kThreads - 1) / kThreads)); }

template <class S>
Error launch_flags(const SelectParams& p, Stream stream) {
  if (p.rows > 0)
    if (const Error error = launch_dependent(select_flags_kernel<S>, rows_grid(p.rows), 0, stream, p)) return error;
  if (p.sequences.count > 0 && needs_walk(p.rule))
    FASTCOMPRESS_LAUNCH(select_walk_kernel<S>, rows_grid(p.sequences.count), dim3(kThreads), 0, stream, p);
  return last_error();
}

}  // namespace

Error launch_prepare(const BatchIn& batch, const AudiosIn& audios, const Sequences& sequences, const Scratch& scratch,
                     Stream stream) {
  constexpr int64_t kTilesPerBlock = 16 * kThreads, kMaxBlocks = 256;
  const int64_t clearing = std::min(kMaxBlocks, (scratch.num_tiles + kTilesPerBlock - 1) / kTilesPerBlock);
  FASTCOMPRESS_LAUNCH(prepare_kernel, dim3(unsigned(1 + clearing)), dim3(kThreads), 0, stream, batch, audios, sequences,
                      scratch);
  return last_error();
}

Error launch_select(bool is_double, const SelectParams& p, Stream stream) {
  if (const Error error = is_double ? launch_flags<double>(p, stream) : launch_flags<float>(p, stream)) return error;
  FASTCOMPRESS_LAUNCH(select_compact_kernel, dim3(unsigned(select_tiles(p.rows))), dim3(kThreads), 0, stream, p);
  return last_error();
}

}  // namespace fastcompress::cuda
