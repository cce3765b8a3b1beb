// One case of the driver's check: inputs of a shape on the host and the device, and the comparison of results.
#pragma once

#include "../cuda/launch.h"
#include "memory.h"
#include "reference.h"

namespace fastcompress::driver {

// Rows, in sequences, and where they lie: `pad` elements between rows, `offset` elements after an aligned address.
// `hostile`: offsets of sequences that do not fit the rows.
struct Shape {
  const char* name;
  Values<int64_t> lengths;
  int64_t width, pad;
  int offset;
  bool hostile;
};

// A generator with the same numbers on every machine.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  int64_t below(int64_t bound) { return int64_t(next() >> 11) % bound; }
  // Approximately normal: the sum of four uniform numbers.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += double(next() >> 11) / double(1ull << 53);
    return (sum - 2) * 1.7320508;
  }
};

template <class T>
T narrowed(double value) {
  T out;
  narrow(accumulate_t<T>(value), out);
  return out;
}

// Rows that change slowly and jump now and then, with equal neighbours and rows of zeros.
template <class T>
Matrix<T> features(int64_t count, int64_t width, int64_t pad, uint64_t seed) {
  Matrix<T> x{Values<T>(size_t(count * (width + pad))), count, width, width + pad};
  Random random(seed);
  Values<double> state(size_t(width), 0.0);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t kind = random.below(12);
    const double keep = kind < 3 ? 0.1 : kind == 11 ? 1.0 : 0.8, add = kind == 11 ? 0.0 : std::sqrt(1 - keep * keep);
    for (int64_t k = 0; k < width; ++k) {
      state[k] = keep * state[k] + add * random.normal();
      x.data[t * x.stride + k] = narrowed<T>(t % 53 == 52 ? 0.0 : state[k]);
    }
  }
  return x;
}

template <class T>
cuda::DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return cuda::DType::kFloat;
  if constexpr (std::is_same_v<T, double>) return cuda::DType::kDouble;
  if constexpr (std::is_same_v<T, BFloat16>) return cuda::DType::kBFloat16;
  return cuda::DType::kHalf;
}

// Counts and prints what was compared.
struct Report {
  int compared = 0, wrong = 0;
  std::string where;

  void fail(const char* what, const std::string& why) {
    ++wrong;
    std::printf("{\"check\": \"%s\", \"where\": \"%s\", \"wrong\": \"%s\"}\n", what, where.c_str(), why.c_str());
  }

  // Compares bits; any NaN equals any other NaN.
  template <class E>
  void same(const char* what, const E* device, const Values<E>& expected) {
    ++compared;
    const Values<E> found = read(device, expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      if (std::memcmp(&found[i], &expected[i], sizeof(E)) == 0 || (is_nan(found[i]) && is_nan(expected[i]))) continue;
      return fail(what, "element " + std::to_string(i) + " of " + std::to_string(expected.size()));
    }
  }

 private:
  template <class E>
  static bool is_nan(E value) {
    if constexpr (std::is_integral_v<E>)
      return false;
    else
      return widen(value) != widen(value);
  }
};

// The batch of a case, prepared on the device.
template <class T>
struct Batch {
  using S = accumulate_t<T>;
  Memory memory;
  const Shape& shape;
  int64_t rows;
  Spans sequences;  // what the kernels must use
  Matrix<T> x;
  const T* data;
  cuda::BatchIn in;

  Batch(const Shape& shape, bool exact) : memory(exact), shape(shape), rows(0) {
    Values<int64_t> offsets{0};
    for (const int64_t length : shape.lengths) offsets.push_back(rows += length);
    const int64_t count = int64_t(shape.lengths.size());
    for (int64_t b = 0; b < count; ++b) {  // a batch that does not fit is replaced by one sequence of all rows
      sequences.begin.push_back(shape.hostile && b > 0 ? rows : offsets[b]);
      sequences.end.push_back(shape.hostile ? rows : offsets[b + 1]);
    }
    if (shape.hostile) {
      offsets[1] = int64_t(1) << 62;
      offsets[count - 1] = -5;
    }
    x = features<T>(rows, shape.width, shape.pad, 7);
    data = memory.input(x.data, shape.offset);
    in = {memory.input(offsets), true, count, 0, rows, false};
  }

  cuda::RowsIn x_in() const { return {data, rows, shape.width, x.stride}; }
  cuda::RowsIn rows_in(const Matrix<T>& matrix) {
    return {memory.input(matrix.data, shape.offset), matrix.count, matrix.width, matrix.stride};
  }
  T* rows_out(int64_t count) { return memory.output<T>(size_t(count * shape.width), shape.offset); }

  // Launches the preparing kernel of an op with this number of tiles.
  cuda::Scratch prepare(int64_t tiles, cuda::Sequences& on_device, const cuda::AudiosIn& audios = {}) {
    const int64_t count = in.count;
    on_device = {memory.output<int64_t>(size_t(count)), memory.output<int64_t>(size_t(count)), count};
    const cuda::Scratch scratch{memory.output<cuda::State>(1), memory.output<uint64_t>(size_t(tiles)), tiles};
    check(cuda::launch_prepare(in, on_device, scratch, nullptr, audios), "prepare");
    return scratch;
  }

  cuda::SegmentsOut segments_out(int64_t bound) {
    return {memory.output<int64_t>(size_t(bound)), memory.output<int64_t>(size_t(bound)),
            memory.output<int32_t>(size_t(in.count + 1)), bound, true};
  }
};

// Compares the kernels of packing (check_pack.cu) for a shape whose rows are the text of a prompt.
template <class T>
void check_pack(Batch<T>& batch, Report& report);

}  // namespace fastcompress::driver
