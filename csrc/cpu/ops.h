// Declares the CPU implementations of the ops.
#pragma once

#include "../ops.h"
#include "tensors.h"

namespace fastcompress::cpu {

FASTCOMPRESS_DECLARE_OPS

}  // namespace fastcompress::cpu
