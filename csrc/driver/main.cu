// Runs and times the CUDA kernels without torch: gpu_driver check | sanitize | ceilings | sweep. Results are JSON
// lines. Under g++, with the emulator of the tests, `check` and `sanitize` run on the CPU.
#include "check.h"
#include "memory.h"

namespace fastcompress {
namespace driver {

void check(int error, const char* what) {
  if (error == 0) return;
#ifdef __CUDACC__
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  const char* text = "a launcher failed";
#endif
  std::printf("{\"error\": \"%s: %s\"}\n", what, text);
  std::exit(2);
}

}  // namespace driver

namespace cuda {

// The device of the driver. runtime.cpp, which the ops use, needs torch.
Device current_device() {
#ifdef __CUDACC__
  Device device{};
  int index = 0;
  driver::check(cudaGetDevice(&index), "cudaGetDevice");
  cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return device;
#else
  return {4, 100 << 10, 99 << 10};
#endif
}

}  // namespace cuda
}  // namespace fastcompress

int main(int argc, char** argv) {
  using namespace fastcompress::driver;
  const std::string mode = argc > 1 ? argv[1] : "";
  auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
#ifdef __CUDACC__
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("{\"error\": \"no CUDA device\"}\n");
    return 3;
  }
#endif
  if (mode == "check" || mode == "sanitize") return check_kernels(mode == "sanitize") == 0 ? 0 : 1;
  if (mode == "ceilings") return measure_ceilings(number(2, int64_t(1) << 30)), 0;
  if (mode == "sweep") return sweep(number(2, 48000), number(3, 1280)), 0;
  std::fprintf(stderr, "gpu_driver check | sanitize | ceilings [BYTES] | sweep [ROWS [WIDTH]]\n");
  return 2;
}
