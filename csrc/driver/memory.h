// Memory of the device for the driver: CUDA's under nvcc, the host's under g++, where the emulator runs the kernels.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/device.h"
#include "../cuda/runtime.h"

namespace fastcompress::driver {

// Ends the process with the text of a CUDA error.
void check(int error, const char* what);

#ifdef __CUDACC__
inline void* allocate(size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes == 0 ? 1 : bytes), "cudaMalloc");
  return data;
}
inline void release(void* data) { cudaFree(data); }
inline void to_device(void* device, const void* host, size_t bytes) {
  check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
inline void to_host(void* host, const void* device, size_t bytes) {
  check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copy to the host");
}
inline void synchronize(const char* what) { check(cudaDeviceSynchronize(), what); }
#else
inline void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 256) / 256 * 256); }
inline void release(void* data) { std::free(data); }
inline void to_device(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
inline void to_host(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
inline void synchronize(const char*) {}
#endif

// Buffers of one case. Each has an allocation of its own. Bytes around it must keep their value, unless `exact` leaves
// them out, so that compute-sanitizer reports an access one byte after the end.
class Memory {
 public:
  explicit Memory(bool exact) : guard_(exact ? 0 : 256) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    for (const Buffer& buffer : buffers_) release(buffer.data);
  }

  // Returns `count` elements that start `offset` elements after an aligned address, filled with a pattern.
  template <class E>
  E* output(size_t count, int offset = 0) {
    const size_t before = guard_ + size_t(offset) * sizeof(E), bytes = count * sizeof(E);
    const std::vector<unsigned char> pattern(before + bytes + guard_, kPattern);
    void* data = allocate(pattern.size());
    to_device(data, pattern.data(), pattern.size());
    buffers_.push_back({data, before, bytes, pattern.size()});
    return reinterpret_cast<E*>(static_cast<char*>(data) + before);
  }
  template <class E>
  E* input(const std::vector<E>& values, int offset = 0) {
    E* data = output<E>(values.size(), offset);
    if (!values.empty()) to_device(data, values.data(), values.size() * sizeof(E));
    return data;
  }

  // Returns whether no byte around a buffer has changed.
  bool intact() const {
    for (const Buffer& buffer : buffers_) {
      std::vector<unsigned char> bytes(buffer.size);
      to_host(bytes.data(), buffer.data, buffer.size);
      for (size_t i = 0; i < buffer.size; ++i)
        if ((i < buffer.before || i >= buffer.before + buffer.bytes) && bytes[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kPattern = 0xa5;
  struct Buffer {
    void* data;
    size_t before, bytes, size;
  };
  size_t guard_;
  std::vector<Buffer> buffers_;
};

// Returns `count` elements of the device.
template <class E>
std::vector<E> read(const E* device, size_t count) {
  std::vector<E> values(count);
  if (count > 0) to_host(values.data(), device, count * sizeof(E));
  return values;
}

}  // namespace fastcompress::driver
