// The modes of the driver.
#pragma once

#include "../cuda/runtime.h"

namespace fastcompress::driver {

// Runs every kernel in every dtype, compares bits with the CPU kernels, and returns how many results differ. `brief`:
// short shapes and allocations of the exact size, for compute-sanitizer.
int check_kernels(bool brief);
// Prints the rates of copies and of reading.
void measure_ceilings(int64_t bytes);
// Prints the time of each variant of the plan and the kernel.
void sweep(int64_t rows, int64_t width);

}  // namespace fastcompress::driver
