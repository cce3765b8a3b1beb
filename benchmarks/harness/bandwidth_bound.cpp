// The least that segment pooling must move, and nothing else: the bandwidth bound of the benchmarks. And arithmetic
// alone, in registers: the other side of the roofline.
//
// Built at run time with g++ -O3 -march=native and called through ctypes. Values are meaningless; traffic and numbers
// of operations are exact.
#include <cstdint>
#include <sys/mman.h>

namespace {

using Line = long long __attribute__((vector_size(64), aligned(16), may_alias));

#ifdef __AVX512F__
constexpr int kVectorBytes = 64, kChains = 24;  // of 32 registers
#else
constexpr int kVectorBytes = 32, kChains = 12;  // of 16
#endif
using Floats = float __attribute__((vector_size(kVectorBytes)));

constexpr int kStreams = 4;  // read positions per thread; some machines want several

inline Line* at(void* base, int64_t row, int64_t row_bytes) {
  return reinterpret_cast<Line*>(static_cast<char*>(base) + row * row_bytes);
}
inline const Line* at(const void* base, int64_t row, int64_t row_bytes) {
  return reinterpret_cast<const Line*>(static_cast<const char*>(base) + row * row_bytes);
}

// A chain depends on itself alone: enough chains keep every unit busy.
template <bool kFused>
void arithmetic(int64_t steps, Floats factor, Floats summand) {
  Floats chain[kChains];
  for (Floats& value : chain) value = factor;
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 24
    for (int k = 0; k < kChains; ++k)
      chain[k] = kFused ? chain[k] * factor + summand : k % 2 == 0 ? chain[k] * factor : chain[k] + summand;
  for (Floats& value : chain) asm volatile("" ::"m"(value));
}

}  // namespace

extern "C" {

// Multiplies and adds in fp32: in one instruction, or in two on chains of their own, as many of each. Returns the
// operations.
int64_t bound_arithmetic(int64_t steps, int fused, int threads) {
  volatile float one = 1.0f, zero = 0.0f;  // unknown to the compiler
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    (fused != 0 ? arithmetic<true> : arithmetic<false>)(steps, Floats{} + one, Floats{} + zero);
  return steps * threads * kChains * (kVectorBytes / int64_t(sizeof(float))) * (fused != 0 ? 2 : 1);
}

// Reads x [rows] once and writes out [out_rows], one row after every rows / out_rows rows read.
void bound_pool(const void* x, int64_t rows, void* out, int64_t out_rows, int64_t row_bytes, int threads) {
  const int64_t lines = row_bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t first = rows * t / threads, last = rows * (t + 1) / threads;
    int64_t written = out_rows * t / threads;
    const int64_t out_last = out_rows * (t + 1) / threads, out_first = written;
    const int64_t steps = (last - first) / kStreams;
    Line sum = {};
    for (int64_t step = 0; step < steps; ++step) {
      const Line* row[kStreams];
      for (int k = 0; k < kStreams; ++k) row[k] = at(x, first + k * steps + step, row_bytes);
      for (int64_t i = 0; i < lines; ++i)
        for (int k = 0; k < kStreams; ++k) sum ^= row[k][i];
      const int64_t target = out_first + (out_last - out_first) * (step + 1) / steps;
      for (; written < target; ++written)
        for (int64_t i = 0; i < lines; ++i) at(out, written, row_bytes)[i] = sum;
    }
    for (int64_t r = first + kStreams * steps; r < last; ++r)
      for (int64_t i = 0; i < lines; ++i) sum ^= at(x, r, row_bytes)[i];
    for (; written < out_last; ++written)  // only when there are fewer rows than streams
      for (int64_t i = 0; i < lines; ++i) at(out, written, row_bytes)[i] = sum;
    volatile Line sink = sum;
    (void)sink;
  }
}

// Reads grad [out_rows] once and writes grad_x [rows], each row of grad into the rows of its segment.
void bound_expand(const void* grad, int64_t out_rows, void* grad_x, int64_t rows, int64_t row_bytes, int threads) {
  const int64_t lines = row_bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < out_rows; ++m) {
    const Line* source = at(grad, m, row_bytes);
    for (int64_t r = rows * m / out_rows; r < rows * (m + 1) / out_rows; ++r) {
      Line* target = at(grad_x, r, row_bytes);
      for (int64_t i = 0; i < lines; ++i) target[i] = source[i];
    }
  }
}

// Asks for huge pages in the memory given, as the library does for large outputs. Advice: failure does not matter.
void bound_advise(void* memory, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // extern "C"
