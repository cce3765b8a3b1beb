#pragma once

#include "../ops.h"

namespace fastcompress::cuda {

FASTCOMPRESS_DECLARE_OPS

}  // namespace fastcompress::cuda
