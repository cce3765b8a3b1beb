// Launches the kernels of segment_reduce.cuh.
#include "dispatch.h"
#include "launch.h"
#include "segment_reduce.cuh"

namespace fastcompress::cuda {
namespace {

bool all_aligned(DType dtype, const ReduceParams& p) {
  const int64_t size = size_of(dtype);
  return is_aligned(p.x, size) && is_aligned(p.out, p.x.width, size) && is_aligned(p.y, size) &&
         is_aligned(p.grad, size);
}

}  // namespace

// Defines launch_<op>, which launches <op>_kernel with one warp per segment and 32 vectors for `warps` segments, unless
// the output is empty.
#define FASTCOMPRESS_DEFINE_LAUNCHER(op, warps, outputs)                                   \
  Error launch_##op(DType dtype, const ReduceParams& p, Stream stream) {                   \
    if ((outputs) == 0 || p.x.width == 0) return 0;                                        \
    return with_type(dtype, [&](auto zero) {                                               \
      using T = decltype(zero);                                                            \
      const dim3 grid = segments_grid<T>(warps, p.x.width);                                \
      FASTCOMPRESS_LAUNCH_ALIGNED(op##_kernel, T, all_aligned(dtype, p), grid, stream, p); \
      return last_error();                                                                 \
    });                                                                                    \
  }

FASTCOMPRESS_DEFINE_LAUNCHER(segment_reduce_fwd, p.segments.count, p.segments.count)
FASTCOMPRESS_DEFINE_LAUNCHER(segment_weighted_mean_fwd, p.segments.count, p.segments.count)
// These have warps for one more segment, which clear the rows after the last one.
FASTCOMPRESS_DEFINE_LAUNCHER(segment_expand_fwd, p.segments.count + 1, p.segments.rows)
FASTCOMPRESS_DEFINE_LAUNCHER(segment_max_bwd, p.segments.count + 1, p.segments.rows)

// One warp processes all columns of its segment.
Error launch_segment_weighted_mean_bwd(DType dtype, const ReduceParams& p, Stream stream) {
  if (p.segments.rows == 0) return 0;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(blocks_of(p.segments.count + 1));
    FASTCOMPRESS_LAUNCH_ALIGNED(segment_weighted_mean_bwd_kernel, T, all_aligned(dtype, p), grid, stream, p);
    return last_error();
  });
}

}  // namespace fastcompress::cuda
