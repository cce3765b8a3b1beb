// Declares one set of row kernel tables per instruction set, and the macro that defines one.
#pragma once

#include "row_kernels.h"

namespace fastcompress {

struct RowKernelTables {
  RowKernels<float> f32;
  RowKernels<double> f64;
  RowKernels<BFloat16> bf16;
  RowKernels<Half> f16;
};

extern const RowKernelTables row_kernels_portable, row_kernels_avx2, row_kernels_avx512;

#define FASTCOMPRESS_DEFINE_ROW_KERNELS(isa)                                                         \
  extern constexpr RowKernelTables row_kernels_##isa = {Impl<float>::table(), Impl<double>::table(), \
                                                        Impl<BFloat16>::table(), Impl<Half>::table()};

}  // namespace fastcompress
