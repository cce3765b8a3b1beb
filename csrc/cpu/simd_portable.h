// Simd<T> for any machine: all types as arrays of 16 bytes.
#pragma once

#define FASTCOMPRESS_VECTOR_BYTES 16
#include "simd_array.h"

namespace fastcompress {
namespace {

template <class T>
struct Simd : ArraySimd<T> {};

}  // namespace
}  // namespace fastcompress
