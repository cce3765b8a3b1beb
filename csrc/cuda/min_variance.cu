// Launches the kernels of min_variance.cuh.
#include "min_variance.cuh"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "launch.h"

namespace fastcompress::cuda {
namespace {

constexpr int64_t kMostScratch = int64_t(256) << 20;  // bytes, for all thread blocks

template <class S, int kLongest>
void launch_short(const VarianceParams& p, Stream stream) {
  FASTCOMPRESS_LAUNCH((short_variance_kernel<S, kLongest>), dim3(unsigned(p.thread_blocks)),
                      dim3(VarianceShape<kLongest>::kVarianceThreads), 0, stream, p);
}

template <class S>
void launch_search(const VarianceParams& p, Stream stream) {
  if (p.max_len <= 8)
    launch_short<S, 8>(p, stream);
  else if (p.max_len <= 12)
    launch_short<S, 12>(p, stream);
  else
    FASTCOMPRESS_LAUNCH(long_variance_kernel<S>, dim3(unsigned(p.thread_blocks)), dim3(kLongThreads), 0, stream, p);
}

}  // namespace

void plan_variance(const Device& device, VarianceParams& p) {
  const int64_t rows = std::min(p.rows, kVarianceBlock), longest = std::min(p.max_len, rows);
  const auto count = int64_t(std::ceil(double(rows) / p.rate));
  int64_t bytes = count * rows * 2 + longest * rows * 8;
  if (p.max_len <= 8)
    bytes = count * VarianceShape<8>::kVarianceThreads * 2;
  else if (p.max_len <= 12)
    bytes = count * VarianceShape<12>::kVarianceThreads * 2;
  p.scratch_bytes = (bytes + 15) / 16 * 16;
  const int64_t fitting = std::max<int64_t>(1, kMostScratch / std::max<int64_t>(1, p.scratch_bytes));
  p.thread_blocks = std::max<int64_t>(1, std::min({p.bound, int64_t(device.processors), fitting}));
}

Error launch_min_variance(bool is_double, const VarianceParams& p, Stream stream) {
  if (p.rows == 0) return 0;
  FASTCOMPRESS_LAUNCH(find_variance_blocks_kernel, dim3(unsigned((p.rows + kThreads - 1) / kThreads)), dim3(kThreads),
                      0, stream, p);
  if (is_double)
    launch_search<double>(p, stream);
  else
    launch_search<float>(p, stream);
  return last_error();
}

}  // namespace fastcompress::cuda
