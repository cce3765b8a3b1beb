// Selects the instance of a kernel by a dtype and an alignment that are known at run time.
#pragma once

#include "../dtype.h"
#include "device.h"
#include "launch.h"
#include "params.h"

namespace fastcompress::cuda {

// Calls f with a value of the C++ type of `dtype`.
template <class F>
Error with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float());
    case DType::kDouble:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kHalf:
      return f(Half());
  }
  return -1;
}

#ifdef __CUDACC__
// Returns an error of a CUDA function, and clears CUDA's copy of it: otherwise the next launch would report it.
inline Error told(cudaError_t error) {
  cudaGetLastError();
  return int(error);
}
#endif

inline Error last_error() {
#ifdef __CUDACC__
  return int(cudaGetLastError());
#else
  return 0;
#endif
}

// Launches a kernel that calls wait_for_previous_launch. On GPUs that support it, its blocks start while the kernel
// before it in the stream is still running.
template <class... Parameters>
Error launch_dependent(void (*kernel)(Parameters...), dim3 grid, int64_t shared_bytes, Stream stream,
                       const Parameters&... parameters) {
#ifdef __CUDACC__
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = launches_overlap() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
  return error == cudaSuccess ? 0 : told(error);
#else
  FASTCOMPRESS_LAUNCH(kernel, grid, dim3(kThreads), size_t(shared_bytes), stream, parameters...);
  return 0;
#endif
}

// Launches kernel<T, aligned>.
#define FASTCOMPRESS_LAUNCH_ALIGNED(kernel, T, aligned, grid, stream, p)           \
  do {                                                                             \
    if (aligned)                                                                   \
      FASTCOMPRESS_LAUNCH((kernel<T, true>), grid, dim3(kThreads), 0, stream, p);  \
    else                                                                           \
      FASTCOMPRESS_LAUNCH((kernel<T, false>), grid, dim3(kThreads), 0, stream, p); \
  } while (false)

}  // namespace fastcompress::cuda
