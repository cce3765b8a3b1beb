// Registers the implementations of all ops with torch. The schemas are in fastcompress/dispatch/schemas.py.
#include "cpu/ops.h"
#ifdef FASTCOMPRESS_CUDA
#include "cuda/ops.h"
#endif

// setup.py defines these for builds with CUDA kernels.
#ifndef FASTCOMPRESS_CUDA
#define FASTCOMPRESS_CUDA_ARCHS ""
#define FASTCOMPRESS_CUDA_VERSION ""
#endif

namespace {
std::string cpu_isa() { return fastcompress::cpu_isa(); }
std::string cuda_archs() { return FASTCOMPRESS_CUDA_ARCHS; }
std::string cuda_version() { return FASTCOMPRESS_CUDA_VERSION; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcompress, CPU, m) { FASTCOMPRESS_REGISTER_OPS(m, cpu); }

#ifdef FASTCOMPRESS_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcompress, CUDA, m) { FASTCOMPRESS_REGISTER_OPS(m, cuda); }
#endif

STABLE_TORCH_LIBRARY_IMPL(fastcompress, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}
