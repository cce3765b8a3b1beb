// Launches the kernels of banded_distance.cuh.
#include "banded_distance.cuh"

#include "dispatch.h"
#include "launch.h"

namespace fastcompress::cuda {

Error launch_banded_distance(DType dtype, const BandParams& p, Stream stream) {
  if (p.x.count == 0) return 0;
  const bool aligned = is_aligned(p.x, size_of(dtype));
  const auto distances = dim3(unsigned((p.x.count * p.window + kThreads - 1) / kThreads));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kRows = kThreads / kGroupLanes<T>;
    const dim3 grid(unsigned((p.x.count + kRows - 1) / kRows), unsigned((p.lags + kLags - 1) / kLags));
    FASTCOMPRESS_LAUNCH_ALIGNED(band_dots_kernel, T, aligned, grid, stream, p);
    FASTCOMPRESS_LAUNCH(band_distances_kernel<accumulate_t<T>>, distances, dim3(kThreads), 0, stream, p);
    return last_error();
  });
}

}  // namespace fastcompress::cuda
