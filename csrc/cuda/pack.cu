// Launches the kernels of pack.cuh.
#include "dispatch.h"
#include "launch.h"
#include "pack.cuh"

namespace fastcompress::cuda {

Error launch_pack_map(const PackMapParams& p, Stream stream) {
  return launch_dependent(pack_map_kernel, dim3(unsigned(select_tiles(p.rows))), 0, stream, p);
}

Error launch_pack_labels(const PackLabelsParams& p, Stream stream) {
  if (p.count == 0) return 0;
  const dim3 grid(unsigned((p.count + kThreads - 1) / kThreads));
  FASTCOMPRESS_LAUNCH(pack_labels_kernel, grid, dim3(kThreads), 0, stream, p);
  return last_error();
}

Error launch_pack_rows(DType dtype, const PackRowsParams& p, Stream stream) {
  if (p.count == 0 || p.rows.width == 0) return 0;
  const dim3 grid(unsigned((p.count + kWarps - 1) / kWarps)), block(kThreads);
  const int64_t size = size_of(dtype);
  if (is_aligned(p.rows, size) && is_aligned(p.audio, size) && is_aligned(p.out, p.rows.width, size))
    FASTCOMPRESS_LAUNCH(pack_rows_kernel<uint4>, grid, block, 0, stream, p);
  else if (size == 8)
    FASTCOMPRESS_LAUNCH(pack_rows_kernel<uint64_t>, grid, block, 0, stream, p);
  else if (size == 4)
    FASTCOMPRESS_LAUNCH(pack_rows_kernel<uint32_t>, grid, block, 0, stream, p);
  else
    FASTCOMPRESS_LAUNCH(pack_rows_kernel<uint16_t>, grid, block, 0, stream, p);
  return last_error();
}

}  // namespace fastcompress::cuda
