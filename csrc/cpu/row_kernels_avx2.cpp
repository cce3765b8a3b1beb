// The row kernels for AVX2.
#include "simd_avx2.h"

#include "row_kernels_impl.h"
#include "row_kernels_tables.h"

namespace fastcompress {

FASTCOMPRESS_DEFINE_ROW_KERNELS(avx2)

}  // namespace fastcompress
