// Binds the CUDA ops for CPU tensors for the tests: g++ compiles the launchers of csrc/cuda, and the emulator runs the
// kernels. The ops are registered as fastcompress_emulated::<op>; tests/support/cuda_emulation/__init__.py defines
// their schemas.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/ops.h"
#include "emulator.h"

namespace fastcompress::cuda {
namespace {
// An imaginary small GPU. Its sizes determine the tiles of the fused op.
Device device{4, 100 << 10, 99 << 10};
// Whether a CUDA graph captures the stream.
bool capturing = false;
}  // namespace

Device current_device() { return device; }
std::shared_ptr<void> enter_device(int32_t) { return nullptr; }
Stream current_stream(int32_t) { return nullptr; }
bool is_capturing(Stream) { return capturing; }
Error read_back(void* host, const void* source, size_t bytes, Stream) {
  if (capturing) return 900;  // cudaErrorStreamCaptureUnsupported
  std::memcpy(host, source, bytes);
  return 0;
}
const char* error_text(Error) { return "a launcher failed"; }

}  // namespace fastcompress::cuda

STABLE_TORCH_LIBRARY_IMPL(fastcompress_emulated, CPU, m) { FASTCOMPRESS_REGISTER_OPS(m, cuda); }

PYBIND11_MODULE(_emulated, m) {
  m.def(
      "set_schedule",
      [](uint64_t seed, int os_threads) {
        emulator::schedule().seed = seed;
        emulator::schedule().os_threads = os_threads;
      },
      pybind11::arg("seed"), pybind11::arg("os_threads"),
      "Set the seed of the order of threads (0: their own order) and the number of resident blocks.");
  m.def(
      "set_device",
      [](int processors, int shared_per_processor, int shared_per_block) {
        fastcompress::cuda::device = {processors, shared_per_processor, shared_per_block};
      },
      pybind11::arg("processors"), pybind11::arg("shared_per_processor"), pybind11::arg("shared_per_block"),
      "Set the imaginary GPU: multiprocessors, and bytes of shared memory.");
  m.def(
      "plan_pool",
      [](std::tuple<int, int, int> gpu, int64_t element_size, int64_t rows, int64_t width, int64_t order) {
        using namespace fastcompress;
        const cuda::DType dtype = element_size == 8   ? cuda::DType::kDouble
                                  : element_size == 2 ? cuda::DType::kBFloat16
                                                      : cuda::DType::kFloat;
        const Rule rule{
            order > 0 ? RuleKind::kLocalMax : RuleKind::kUniform, std::max<int64_t>(1, order), 0, 0, 1, 0, true};
        const cuda::RowsIn x{nullptr, rows, width, width};
        const cuda::PoolPlan plan =
            cuda::plan_pool({std::get<0>(gpu), std::get<1>(gpu), std::get<2>(gpu)}, dtype, x, x, rule);
        return std::make_tuple(plan.tile_rows, plan.num_tiles, plan.staged,
                               plan.shared_bytes + cuda::pool_static_shared(dtype), cuda::pool_halo(rule), plan.pitch,
                               plan.cycles);
      },
      "Return the plan of segment_pool for a GPU: rows per tile, tiles, whether rows are staged, bytes of shared "
      "memory, rows of the halo, bytes between rows, modelled cycles.");
  m.def(
      "set_capturing", [](bool capturing) { fastcompress::cuda::capturing = capturing; }, pybind11::arg("capturing"),
      "Set whether a CUDA graph captures the stream. Then a copy to the host fails, as on a GPU.");
}
