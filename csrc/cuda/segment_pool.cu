// Plans and launches the kernel of segment_pool.cuh.
#include <algorithm>

#include "dispatch.h"
#include "launch.h"
#include "segment_pool.cuh"

namespace fastcompress::cuda {
namespace {

template <class Kernel>
Error launch(const Kernel& kernel, const PoolParams& p, const PoolPlan& plan, Stream stream) {
#ifdef __CUDACC__
  if (plan.staged) {
    // Raise the limit of the kernel above the default 48 KiB, and prefer shared memory to the first-level cache. The
    // value is the same in each call, because the limit belongs to the kernel and another thread may be launching it.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_limit);
    if (error == cudaSuccess)
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return told(error);
  }
#endif
  FASTCOMPRESS_LAUNCH(kernel, dim3(unsigned(plan.num_tiles)), dim3(kThreads), size_t(plan.shared_bytes), stream, p);
  return last_error();
}

int64_t halo_rows(const Rule& rule) {
  return rows_before(rule) + rows_after(rule) + (rule.needs_distance() ? kExtraRows : 0);
}

}  // namespace

PoolPlan plan_pool(const Device& device, DType dtype, const RowsIn& x, const RowsIn& keys, const Rule& rule) {
  // A tile with fewer rows would score more rows of its halo than of its own.
  constexpr int64_t kMinRows = 8;
  // Numbers of resident blocks per multiprocessor to try, in order: with several, the copies of one block overlap the
  // arithmetic of the others.
  constexpr int kBlocksWanted[] = {3, 2, 1};
  const int64_t size = size_of(dtype), halo = halo_rows(rule);
  const int64_t fixed = dtype == DType::kDouble ? sizeof(PoolShared<double>) : sizeof(PoolShared<float>);
  constexpr int64_t kReserved = 1024;  // shared memory per block that CUDA reserves
  PoolPlan plan{int(kThreads - halo), 1, false, 0, 0, int(device.shared_per_block - fixed)};
  // Staging pays off only if rows are read twice, which they are not for Uniform or with separate keys.
  const bool own_keys = keys.data != x.data || keys.width != x.width || keys.stride != x.stride;
  const bool read_twice = rule.needs_distance() && !own_keys;
  if (read_twice && x.width > 0 && is_aligned(x, size) && x.width * size <= device.shared_per_block) {
    // With a pitch of 64 mod 128 bytes, the two rows of a half type that a warp reads in one phase are in different
    // banks.
    int64_t pitch = x.width * size;
    while (pitch % 128 != 64) pitch += 16;
    for (const int blocks : kBlocksWanted) {
      const int64_t room =
          std::min<int64_t>(device.shared_per_processor / blocks - kReserved, device.shared_per_block) - fixed;
      const int64_t rows = std::min<int64_t>(room / pitch, kThreads) - halo;
      if (rows < kMinRows) continue;
      plan.staged = true;
      plan.tile_rows = int(rows);
      plan.pitch = int(pitch);
      break;
    }
  }
  // Use smaller tiles for a short batch, so that all multiprocessors get one.
  const int64_t share = std::max(kMinRows, (x.count + device.processors - 1) / device.processors);
  plan.tile_rows = int(std::min<int64_t>(plan.tile_rows, share));
  if (plan.staged) plan.shared_bytes = int((plan.tile_rows + halo) * plan.pitch);
  plan.num_tiles = std::max<int64_t>(1, (x.count + plan.tile_rows - 1) / plan.tile_rows);
  return plan;
}

Error launch_segment_pool_fwd(DType dtype, const PoolParams& p, const PoolPlan& plan, Stream stream) {
  const int64_t size = size_of(dtype);
  const bool aligned = is_aligned(p.x, size) && is_aligned(p.keys, size) && is_aligned(p.values, p.x.width, size);
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan.staged) return launch(segment_pool_fwd_kernel<T, true, true>, p, plan, stream);
    if (aligned) return launch(segment_pool_fwd_kernel<T, true, false>, p, plan, stream);
    return launch(segment_pool_fwd_kernel<T, false, false>, p, plan, stream);
  });
}

}  // namespace fastcompress::cuda
