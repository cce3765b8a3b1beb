// Launches the kernels of integrate_and_fire.cuh.
#include "dispatch.h"
#include "integrate_and_fire.cuh"
#include "launch.h"

namespace fastcompress::cuda {

Error launch_integrate_rows_fwd(DType dtype, const IntegrateParams& p, Stream stream) {
  if (p.tokens.count == 0 || p.x.width == 0) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = is_aligned(p.x, sizeof(T)) && is_aligned(p.out, p.x.width, sizeof(T));
    FASTCOMPRESS_LAUNCH_ALIGNED(integrate_rows_fwd_kernel, T, aligned, segments_grid<T>(p.tokens.count, p.x.width),
                                stream, p);
    return last_error();
  });
}

// Runs also for width 0, to write the gradients of the weights, which are then 0.
Error launch_integrate_rows_bwd(DType dtype, const IntegrateParams& p, Stream stream) {
  const int64_t items = p.tokens.rows + p.tokens.count;
  if (items == 0) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kItems = kWarps * (32 / kGroupLanes<T>);
    const bool aligned =
        is_aligned(p.x, sizeof(T)) && is_aligned(p.grad, sizeof(T)) && is_aligned(p.out, p.x.width, sizeof(T));
    const dim3 grid(unsigned((items + kItems - 1) / kItems));
    FASTCOMPRESS_LAUNCH_ALIGNED(integrate_rows_bwd_kernel, T, aligned, grid, stream, p);
    return last_error();
  });
}

}  // namespace fastcompress::cuda
