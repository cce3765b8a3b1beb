// Selects the row kernels of the best instruction set that this machine supports, once per process.
#include "row_kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "row_kernels_tables.h"

namespace fastcompress {
namespace {

struct Isa {
  const char* name;
  const RowKernelTables* tables;
  bool present;
};

const Isa& chosen() {
  static const Isa& isa = [&]() -> const Isa& {
    static const Isa isas[] = {
#ifdef FASTCOMPRESS_X86_64
        {"avx512", &row_kernels_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
        {"avx2", &row_kernels_avx2, bool(__builtin_cpu_supports("avx2"))},  // implies F16C, which is older
#endif
        {"portable", &row_kernels_portable, true},
    };
    const char* wanted = std::getenv("FASTCOMPRESS_CPU_ISA");
    const Isa* best = nullptr;
    for (const Isa& isa : isas) {
      if (!isa.present) continue;
      if (best == nullptr) best = &isa;
      if (wanted != nullptr && std::strcmp(wanted, isa.name) == 0) return isa;
    }
    if (wanted != nullptr && *wanted != '\0')
      std::fprintf(stderr,
                   "fastcompress: FASTCOMPRESS_CPU_ISA=%s is unknown or not supported by this machine; using %s\n",
                   wanted, best->name);
    return *best;
  }();
  return isa;
}

}  // namespace

const char* cpu_isa() { return chosen().name; }

template <>
const RowKernels<float>& row_kernels() {
  return chosen().tables->f32;
}
template <>
const RowKernels<double>& row_kernels() {
  return chosen().tables->f64;
}
template <>
const RowKernels<BFloat16>& row_kernels() {
  return chosen().tables->bf16;
}
template <>
const RowKernels<Half>& row_kernels() {
  return chosen().tables->f16;
}

}  // namespace fastcompress
