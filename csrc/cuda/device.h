// CUDA features beyond the language that the kernels use: launches, memory ordering and asynchronous copies. Compiled
// by g++, the same names call the emulator of the tests instead of a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define FASTCOMPRESS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FASTCOMPRESS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastcompress::cuda {

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// Starts a copy of 16 bytes from global to shared memory that bypasses the first-level cache. All threads of the block
// can read them after wait_for_copies and a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace fastcompress::cuda

#else

#include <cmath>

#include "emulator.h"

#define FASTCOMPRESS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(grid, block, shared_bytes, [=] { (kernel)(__VA_ARGS__); })
#define FASTCOMPRESS_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(emulator::dynamic_shared())

namespace fastcompress::cuda {

inline uint64_t load_acquire(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_release(uint64_t* p, uint64_t value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

inline void copy_async(void* shared, const void* global) { emulator::start_copy(shared, global); }
inline void wait_for_copies() {
  for (const emulator::AsyncCopy& copy : emulator::take_copies()) std::memcpy(copy.target, copy.source, 16);
}

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace fastcompress::cuda

#endif
