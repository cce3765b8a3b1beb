// Launches the kernels of greedy_segments.cuh.
#include "dispatch.h"
#include "greedy_segments.cuh"
#include "launch.h"

namespace fastcompress::cuda {
namespace {

template <class Kernel>
Error launch_walk(const Kernel& kernel, const GreedyParams& p, int64_t shared_bytes, Stream stream) {
#ifdef __CUDACC__
  if (shared_bytes > 48 << 10) {  // more than the default limit of a kernel, as in segment_pool.cu
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, current_device().shared_per_block);
    if (error != cudaSuccess) return told(error);
  }
#endif
  FASTCOMPRESS_LAUNCH(kernel, dim3(unsigned(p.sequences.count)), dim3(kThreads), size_t(shared_bytes), stream, p);
  return last_error();
}

}  // namespace

int64_t greedy_shared_bytes(const Device& device, DType dtype, const RowsIn& x) {
  const int64_t size = size_of(dtype), wide = dtype == DType::kDouble ? 8 : 4;
  const int64_t bytes = 2 * padded_width(x.width) * wide + 3 * x.width * size;
  return is_aligned(x, size) && bytes <= device.shared_per_block ? bytes : 0;
}

Error launch_greedy_boundaries(DType dtype, const GreedyParams& p, int64_t shared_bytes, Stream stream) {
  if (p.x.count == 0) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kRows = kThreads / kGroupLanes<T>;
    const dim3 grid(unsigned((p.x.count + kRows - 1) / kRows));
    const bool aligned = is_aligned(p.x, sizeof(T));
    const auto norms = aligned ? greedy_norms_kernel<T, true> : greedy_norms_kernel<T, false>;
    if (const Error error = launch_dependent(norms, grid, 0, stream, p)) return error;
    if (p.sequences.count == 0) return Error(0);
    if (shared_bytes > 0) return launch_walk(greedy_walk_kernel<T, true>, p, shared_bytes, stream);
    return launch_walk(greedy_walk_kernel<T, false>, p, 0, stream);
  });
}

}  // namespace fastcompress::cuda
