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

// A word that blocks exchange. The accesses are relaxed: the word has to carry everything that it announces. A release
// would wait for all earlier stores of the block, and an acquire would drop the first-level cache.
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// Loads a value that is not read again, so that the caches evict it first.
template <class V>
__device__ __forceinline__ V load_streaming(const V* p) {
  return __ldcs(p);
}

// An address in shared memory. Loads by a generic pointer would compute it again from the base of the block each time.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(void* p) {
  uint32_t address;  // opaque to the compiler, which would otherwise compute it at each use
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))));
  return address;
}
__device__ __forceinline__ uint4 load_shared(SharedAddress address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}

// Starts a copy of 16 bytes from global to shared memory that bypasses the first-level cache. All threads of the block
// can read them after wait_for_copies and a barrier.
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Programmatic dependent launch: a kernel that launch_dependent launched may start once all blocks of the one before it
// have called allow_next_launch, and must not use its results before wait_for_previous_launch. The waiting hides the
// time between two launches. Before sm_90 both do nothing, and launches do not overlap.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fastcompress::cuda

#else

#include <cmath>

#include "emulator.h"

#define FASTCOMPRESS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(grid, block, shared_bytes, [=] { (kernel)(__VA_ARGS__); })
#define FASTCOMPRESS_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(emulator::dynamic_shared())

namespace fastcompress::cuda {

inline uint64_t load_relaxed(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_relaxed(uint64_t* p, uint64_t value) { __atomic_store_n(p, value, __ATOMIC_RELAXED); }

template <class V>
V load_streaming(const V* p) {
  return *p;
}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* p) { return static_cast<SharedAddress>(p); }
inline uint4 load_shared(SharedAddress address) { return *reinterpret_cast<const uint4*>(address); }

inline void copy_async(SharedAddress shared, const void* global) { emulator::start_copy(shared, global); }
inline void wait_for_copies() {
  for (const emulator::AsyncCopy& copy : emulator::take_copies()) std::memcpy(copy.target, copy.source, 16);
}

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline void allow_next_launch() {}
inline void wait_for_previous_launch() {}

}  // namespace fastcompress::cuda

#endif
