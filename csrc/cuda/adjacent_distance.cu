// Launches the kernels of adjacent_distance.cuh.
#include "adjacent_distance.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fastcompress::cuda {
namespace {

template <class T>
dim3 groups_grid(int64_t rows) {
  constexpr int64_t kRows = kThreads / kGroupLanes<T>;
  return dim3(unsigned((rows + kRows - 1) / kRows));
}

}  // namespace

Error launch_adjacent_distance_fwd(DType dtype, const DistanceParams& p, Stream stream) {
  if (p.x.count == 0) return 0;
  const bool aligned = is_aligned(p.x, size_of(dtype));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FASTCOMPRESS_LAUNCH_ALIGNED(adjacent_distance_fwd_kernel, T, aligned, groups_grid<T>(p.x.count), stream, p);
    return last_error();
  });
}

Error launch_adjacent_distance_bwd(DType dtype, const DistanceParams& p, Stream stream) {
  if (p.x.count == 0) return 0;
  const bool aligned = is_aligned(p.x, size_of(dtype)) && is_aligned(p.out, p.x.width, size_of(dtype));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    FASTCOMPRESS_LAUNCH_ALIGNED(adjacent_distance_bwd_kernel, T, aligned, groups_grid<T>(p.x.count), stream, p);
    return last_error();
  });
}

}  // namespace fastcompress::cuda
