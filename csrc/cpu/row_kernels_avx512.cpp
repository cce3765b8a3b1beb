// The row kernels for AVX-512.
#include "simd_avx512.h"

#include "row_kernels_impl.h"
#include "row_kernels_tables.h"

namespace fastcompress {

FASTCOMPRESS_DEFINE_ROW_KERNELS(avx512)

}  // namespace fastcompress
