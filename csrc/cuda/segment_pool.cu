// Launches the kernel of segment_pool.cuh.
#include <atomic>

#include "dispatch.h"
#include "launch.h"
#include "segment_pool.cuh"

namespace fastcompress::cuda {
namespace {

// The devices, one bit each, on which an instance of the kernel has its attributes.
using Configured = std::atomic<uint64_t>;

// Raises the limit of the shared memory of a kernel above the default 48 KiB, and prefers shared memory to the
// first-level cache. Both are the same in each call, because they belong to the kernel and another thread may be
// launching it.
Error configure([[maybe_unused]] const void* kernel, [[maybe_unused]] int shared_limit,
                [[maybe_unused]] Configured& configured) {
#ifdef __CUDACC__
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return told(error);
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (configured.load(std::memory_order_relaxed) & bit) return 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit);
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return told(error);
  configured.fetch_or(bit, std::memory_order_relaxed);
#endif
  return 0;
}

}  // namespace

int64_t pool_static_shared(DType dtype) {
  return dtype == DType::kDouble ? sizeof(PoolShared<double>) : sizeof(PoolShared<float>);
}

Error launch_segment_pool_fwd(DType dtype, const PoolParams& p, const PoolPlan& plan, Stream stream) {
  const int64_t size = size_of(dtype);
  const bool aligned = is_aligned(p.x, size) && is_aligned(p.keys, size) && is_aligned(p.values, p.x.width, size);
  const dim3 grid(unsigned(plan.num_tiles));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan.staged) {
      static Configured configured{0};
      void (*const kernel)(PoolParams) = segment_pool_fwd_kernel<T, true, true>;
      const Error error = configure(reinterpret_cast<const void*>(kernel), plan.shared_limit, configured);
      return error != 0 ? error : launch_dependent(kernel, grid, plan.shared_bytes, stream, p);
    }
    return launch_dependent(
        aligned ? segment_pool_fwd_kernel<T, true, false> : segment_pool_fwd_kernel<T, false, false>, grid, 0, stream,
        p);
  });
}

}  // namespace fastcompress::cuda
