// Launches the kernels of adjacent_distance.cuh.
#include "adjacent_distance.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fastcompress::cuda {
namespace {

template <class T>
dim3 groups_grid(int64_t rows, int rows_per_group) {
  const int64_t per_block = kThreads / kGroupLanes<T> * rows_per_group;
  return dim3(unsigned((rows + per_block - 1) / per_block));
}

}  // namespace

Error launch_adjacent_distance_fwd(DType dtype, const DistanceParams& p, Stream stream) {
  if (p.x.count == 0) return 0;
  const bool aligned = is_aligned(p.x, size_of(dtype));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid = groups_grid<T>(p.x.count, rows_per_group(p.lag));
    return launch_dependent(aligned ? adjacent_distance_fwd_kernel<T, true> : adjacent_distance_fwd_kernel<T, false>,
                            grid, 0, stream, p);
  });
}

Error launch_adjacent_distance_bwd(DType dtype, const DistanceParams& p, Stream stream) {
  if (p.x.count == 0) return 0;
  const bool aligned = is_aligned(p.x, size_of(dtype)) && is_aligned(p.out, p.x.width, size_of(dtype));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch_dependent(aligned ? adjacent_distance_bwd_kernel<T, true> : adjacent_distance_bwd_kernel<T, false>,
                            groups_grid<T>(p.x.count, 1), 0, stream, p);
  });
}

}  // namespace fastcompress::cuda
