// Prints the plan of the fused kernel for a device, dtype and shape, for scripts/sass. Built by g++ with the emulator
// of the tests, so that no CUDA toolkit is needed.
#include <cstdio>
#include <cstdlib>

#include "cuda/launch.h"
#include "cuda/rows.cuh"

using namespace fastcompress;
using namespace fastcompress::cuda;

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "plan PROCESSORS SHARED_PER_PROCESSOR SHARED_PER_BLOCK DTYPE ROWS WIDTH ORDER\n");
    return 2;
  }
  auto number = [&](int i) { return std::atoll(argv[i]); };
  const Device device{int(number(1)), int(number(2)), int(number(3))};
  const DType dtype = DType(number(4));
  static char aligned alignas(16);
  const RowsIn x{&aligned, number(5), number(6), number(6)};
  Rule rule{};
  rule.kind = RuleKind::kLocalMax;
  rule.size = number(7);
  const PoolPlan plan = plan_pool(device, dtype, x, x, rule);
  const int64_t halo = rows_before(rule) + rows_after(rule) + kExtraRows;
  std::printf("{\"tile_rows\": %d, \"halo\": %d, \"num_tiles\": %lld, \"staged\": %s, \"shared_bytes\": %d, ",
              plan.tile_rows, int(halo), static_cast<long long>(plan.num_tiles), plan.staged ? "true" : "false",
              plan.shared_bytes);
  std::printf("\"threads\": %d, \"lanes_per_row\": %d}\n", kThreads, int(kLanes * size_of(dtype) / 16));
}
