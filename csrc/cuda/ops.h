// Declares the CUDA implementations of the ops.
#pragma once

#include "../ops.h"

namespace fastcompress::cuda {

FASTCOMPRESS_DECLARE_OPS

}  // namespace fastcompress::cuda
