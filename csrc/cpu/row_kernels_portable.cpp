// The row kernels for any machine.
#include "simd_portable.h"

#include "row_kernels_impl.h"
#include "row_kernels_tables.h"

namespace fastcompress {

FASTCOMPRESS_DEFINE_ROW_KERNELS(portable)

}  // namespace fastcompress
