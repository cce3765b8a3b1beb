// The rates that no kernel can exceed: copies, reading, three reads per write as in pooling, and stores of 4 and 16
// bytes. All memory holds random bytes, since a GPU may compress constants.
#include "check.h"
#include "timer.h"

namespace fastcompress::driver {
namespace {

constexpr int kBlock = 256, kUnroll = 4;

__device__ inline unsigned scrambled(uint64_t value) {
  value = (value ^ value >> 33) * 0xff51afd7ed558ccdull;
  return unsigned((value ^ value >> 29) >> 16);
}

__global__ void random_kernel(uint4* out, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i < count) {
    const uint64_t seed = uint64_t(i) * 0x9e3779b97f4a7c15ull;
    out[i] = uint4{scrambled(seed), scrambled(seed + 1), scrambled(seed + 2), scrambled(seed + 3)};
  }
}

// out[i] = the exclusive or of in[k * count + i] for k < kReads. A block copies kBlock * kUnroll vectors.
template <int kReads>
__global__ void mix_kernel(const uint4* in, uint4* out, int64_t count) {
  const int64_t first = int64_t(blockIdx.x) * (kBlock * kUnroll) + threadIdx.x;
  uint4 values[kUnroll][kReads];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
#pragma unroll
    for (int k = 0; k < kReads; ++k)
      if (first + u * kBlock < count) values[u][k] = in[k * count + first + u * kBlock];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kBlock >= count) continue;
    uint4 sum = values[u][0];
#pragma unroll
    for (int k = 1; k < kReads; ++k) {
      sum.x ^= values[u][k].x, sum.y ^= values[u][k].y, sum.z ^= values[u][k].z, sum.w ^= values[u][k].w;
    }
    out[first + u * kBlock] = sum;
  }
}

// Writes only if all bytes of a vector are equal to `never`.
__global__ void read_kernel(const uint4* in, int64_t count, uint4 never, uint4* out) {
  const int64_t first = int64_t(blockIdx.x) * (kBlock * kUnroll) + threadIdx.x;
  uint4 sum{0, 0, 0, 0};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kBlock >= count) continue;
    const uint4 value = in[first + u * kBlock];
    sum.x ^= value.x, sum.y ^= value.y, sum.z ^= value.z, sum.w ^= value.w;
  }
  if (sum.x == never.x && sum.y == never.y && sum.z == never.z && sum.w == never.w) out[0] = sum;
}

// Stores 16 bytes per lane, in one instruction or in four of 4 bytes each.
template <bool kWide>
__global__ void store_kernel(unsigned* out, int64_t count, unsigned seed) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const unsigned value = seed ^ unsigned(i) * 2654435761u;
  if constexpr (kWide) {
    reinterpret_cast<uint4*>(out)[i] = uint4{value, value + 1, value + 2, value + 3};
  } else {
    volatile unsigned* words = out + 4 * i;  // the compiler must not join the stores
    words[0] = value, words[1] = value + 1, words[2] = value + 2, words[3] = value + 3;
  }
}

dim3 grid(int64_t count, int per_block) { return dim3(unsigned((count + per_block - 1) / per_block)); }

void print(const char* name, double bytes, double seconds) {
  std::printf("{\"ceiling\": \"%s\", \"bytes\": %.0f, \"seconds\": %.9f, \"GB_per_s\": %.1f}\n", name, bytes, seconds,
              bytes / seconds / 1e9);
  std::fflush(stdout);
}

}  // namespace

void measure_ceilings(int64_t bytes) {
  const int64_t count = std::max<int64_t>(1, bytes / 64);  // vectors per part; three parts are read, one is written
  Timer timer(kFlushBytes, kRepetitions);
  auto* in = static_cast<uint4*>(allocate(size_t(count) * 48));
  auto* out = static_cast<uint4*>(allocate(size_t(count) * 48));
  FASTCOMPRESS_LAUNCH(random_kernel, grid(3 * count, kBlock), dim3(kBlock), 0, nullptr, in, 3 * count);
  synchronize("random bytes");
  const double vector = 16;
  constexpr int kPer = kBlock * kUnroll;
  const uint4 never{1, 2, 3, 4};
  print("copy", 6 * vector * double(count), timer.seconds([&](cuda::Stream stream) {
    FASTCOMPRESS_LAUNCH(mix_kernel<1>, grid(3 * count, kPer), dim3(kBlock), 0, stream, in, out, 3 * count);
  }));
  print("read", 3 * vector * double(count), timer.seconds([&](cuda::Stream stream) {
    FASTCOMPRESS_LAUNCH(read_kernel, grid(3 * count, kPer), dim3(kBlock), 0, stream, in, 3 * count, never, out);
  }));
  print("store 16 bytes", 3 * vector * double(count), timer.seconds([&](cuda::Stream stream) {
    FASTCOMPRESS_LAUNCH(store_kernel<true>, grid(3 * count, kBlock), dim3(kBlock), 0, stream,
                        reinterpret_cast<unsigned*>(out), 3 * count, 1u);
  }));
  print("store 4 bytes", 3 * vector * double(count), timer.seconds([&](cuda::Stream stream) {
    FASTCOMPRESS_LAUNCH(store_kernel<false>, grid(3 * count, kBlock), dim3(kBlock), 0, stream,
                        reinterpret_cast<unsigned*>(out), 3 * count, 2u);
  }));
  print("3 reads per write", 4 * vector * double(count), timer.seconds([&](cuda::Stream stream) {
    FASTCOMPRESS_LAUNCH(mix_kernel<3>, grid(count, kPer), dim3(kBlock), 0, stream, in, out, count);
  }));
  // The last result is checked on a few vectors.
  const int64_t some = std::min<int64_t>(count, 1000);
  for (int64_t i = 0; i < some; ++i) {
    uint4 parts[3], sum;
    for (int k = 0; k < 3; ++k) to_host(&parts[k], in + k * count + i, sizeof(uint4));
    to_host(&sum, out + i, sizeof sum);
    if (sum.x != (parts[0].x ^ parts[1].x ^ parts[2].x) || sum.w != (parts[0].w ^ parts[1].w ^ parts[2].w)) {
      std::printf("{\"error\": \"ceilings: wrong result\"}\n");
      std::exit(1);
    }
  }
  release(in);
  release(out);
}

}  // namespace fastcompress::driver
