// Launches the kernels of prepare.cuh and select_boundaries.cuh.
#include <algorithm>
#include <atomic>

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

bool launches_overlap() {
#ifdef __CUDACC__
  // All kernels of the library are compiled for the same architectures, so that one of them answers for all. With code
  // for sm_80 only, later GPUs run that.
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];  // 0: unknown, 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMost) return false;
  if (const int answer = known[device].load(std::memory_order_relaxed)) return answer == 2;
  int major = 0;
  cudaFuncAttributes attributes{};
  const bool asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(prepare_kernel)) == cudaSuccess;
  if (!asked) cudaGetLastError();
  const bool overlap = asked && major >= 9 && attributes.ptxVersion >= 90;
  known[device].store(overlap ? 2 : 1, std::memory_order_relaxed);
  return overlap;
#else
  return false;
#endif
}

Error launch_prepare(const BatchIn& batch, const Sequences& sequences, const Scratch& scratch, Stream stream,
                     const AudiosIn& audios) {
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
