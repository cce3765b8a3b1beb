// What implements what. The schemas are in fastcompress/schemas.py.
#include "cpu/ops.h"

namespace {
std::string cpu_isa() { return fastcompress::cpu_isa(); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcompress, CPU, m) {
  namespace cpu = fastcompress::cpu;
  m.impl("adjacent_distance", TORCH_BOX(&cpu::adjacent_distance));
  m.impl("adjacent_distance_backward", TORCH_BOX(&cpu::adjacent_distance_backward));
  m.impl("select_boundaries", TORCH_BOX(&cpu::select_boundaries));
  m.impl("segment_reduce", TORCH_BOX(&cpu::segment_reduce));
  m.impl("segment_max_backward", TORCH_BOX(&cpu::segment_max_backward));
  m.impl("segment_weighted_mean", TORCH_BOX(&cpu::segment_weighted_mean));
  m.impl("segment_weighted_mean_backward", TORCH_BOX(&cpu::segment_weighted_mean_backward));
  m.impl("segment_expand", TORCH_BOX(&cpu::segment_expand));
  m.impl("segment_pool", TORCH_BOX(&cpu::segment_pool));
}

STABLE_TORCH_LIBRARY_IMPL(fastcompress, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
