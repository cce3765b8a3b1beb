// Devices, streams and copies for the CUDA ops; see runtime.h.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <mutex>

// Exists only in CUDA builds of torch; a weak reference lets the library load in others.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastcompress::cuda {

Device current_device() {
  constexpr int kMost = 64;  // devices whose properties are queried only once
  static Device known[kMost];
  static std::once_flag once[kMost];
  int index = 0;
  Device device{1, 48 << 10, 48 << 10};
  if (cudaGetDevice(&index) != cudaSuccess) return device;  // the launch will report the error
  auto query = [&] {
    cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  };
  if (index >= kMost) {
    query();
    return device;
  }
  std::call_once(once[index], [&] {
    query();
    known[index] = device;
  });
  return known[index];
}

std::shared_ptr<void> enter_device(int32_t device) {
  return std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
}

Stream current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "the installed torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The query fails on the legacy default stream while another stream is captured; that capture forbids waiting, too.
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaErrorStreamCaptureImplicit || status != cudaStreamCaptureStatusNone;
}

Error read_back(void* host, const void* device, size_t bytes, Stream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cuda_stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(cuda_stream);
  if (error != cudaSuccess) cudaGetLastError();  // clears the error, which the next launch would report otherwise
  return int(error);
}

const char* error_text(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastcompress::cuda
