// CUDA runtime functions that the host code of the ops calls. runtime.cpp implements them for a GPU, and the tests
// implement them for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "params.h"

namespace fastcompress::cuda {

// Properties of a device on which the plan of a launch depends.
struct Device {
  int processors;            // number of streaming multiprocessors
  int shared_per_processor;  // shared memory per multiprocessor, bytes
  int shared_per_block;      // largest shared memory of a block, bytes
};
Device current_device();

// Makes a device the current one until the returned guard is destroyed.
std::shared_ptr<void> enter_device(int32_t device);
// Returns torch's current stream of a device.
Stream current_stream(int32_t device);
// Returns whether a CUDA graph captures the stream. Then nothing may wait for it, or read the results of its work.
bool is_capturing(Stream stream);
// Copies from the device to the host after all work on the stream, and waits for the copy.
Error read_back(void* host, const void* device, size_t bytes, Stream stream);
const char* error_text(Error error);

}  // namespace fastcompress::cuda
