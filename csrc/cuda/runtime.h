// What the ops ask of CUDA on the host. runtime.cpp answers for a GPU; the tests answer for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "params.h"

namespace fastcompress::cuda {

// What the plan of a launch depends on.
struct Device {
  int processors;            // streaming multiprocessors
  int shared_per_processor;  // bytes
  int shared_per_block;      // bytes, at most
};
Device current_device();

// Makes a device the current one until the guard that it returns is gone.
std::shared_ptr<void> enter_device(int32_t device);
// Torch's current stream of a device.
Stream current_stream(int32_t device);
// Waits for the stream, then copies from the device.
Error read_back(void* host, const void* device, size_t bytes, Stream stream);
const char* error_text(Error error);

}  // namespace fastcompress::cuda
