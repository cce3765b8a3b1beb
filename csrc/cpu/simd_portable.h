// Every type as arrays.
#pragma once

#include "simd_array.h"

namespace fastcompress {
namespace {

template <class T>
struct Simd : ArraySimd<T> {};

}  // namespace
}  // namespace fastcompress
