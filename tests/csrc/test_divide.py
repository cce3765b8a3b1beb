"""The division of csrc/cuda/divide.h rounds like the IEEE 754 division."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCE = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include "cuda/divide.h"

using namespace fastcompress;
using namespace fastcompress::cuda;

template <class T>
long check(const float (&x)[8], int64_t frames) {
  float result[8];
  std::memcpy(result, x, sizeof result);
  divide<T>(result, Frames<float>(frames));
  long wrong = 0;
  for (int i = 0; i < 8; ++i) {
    const float expected = x[i] / float(frames);
    const bool both_nan = result[i] != result[i] && expected != expected;
    if (both_nan || float_bits(result[i]) == float_bits(expected)) continue;
    if (wrong++ == 0) std::printf("%a / %ld = %a, not %a\n", x[i], long(frames), expected, result[i]);
  }
  return wrong;
}

int main(int count, char** arguments) {
  const int64_t first = std::atol(arguments[1]), last = std::atol(arguments[2]);
  long wrong = 0;
  // Every significand by every divisor in [first, last). The rounding does not depend on the exponent.
  for (int64_t n = first; n < last; ++n)
    for (uint32_t bits = 0x3f800000; bits < 0x40000000; bits += 8) {
      float x[8];
      for (int i = 0; i < 8; ++i) x[i] = bits_float(bits + i);
      wrong += check<float>(x, n);
    }
  // Random bits: all exponents, subnormal numbers, infinities and NaN, by divisors up to beyond the largest reciprocal.
  std::mt19937_64 random(first);
  for (long round = 0; round < 4000000; ++round) {
    const int64_t n = 1 + int64_t(random() >> (1 + random() % 63));
    const int kind = int(random() % 8);
    float x[8], half[8];
    for (float& value : x) {
      uint32_t bits = uint32_t(random());
      if (kind == 1) bits = (bits & 0x80ffffff) | uint32_t(random() % 24) << 23;     // tiny
      if (kind == 2) bits = bits & 0x800fffff;                                       // subnormal
      if (kind == 3 && random() % 4 == 0) bits = bits & 0x80000000;                  // zeros among others
      if (kind == 4 && random() % 8 == 0) bits = (bits & 0x80000000) | 0x7f800000;   // an infinity among others
      if (kind == 5) bits = bits & 0xffff0000;                                       // a bf16 number
      if (kind == 6) bits = (bits & 0x807fffff) | uint32_t(100 + random() % 60) << 23;  // ordinary
      if (kind == 7) bits = (bits & 0x807fffff) | 0x7f000000;                        // huge
      value = bits_float(bits);
      const float ordinary = bits_float((bits & 0x807fffff) | uint32_t(100 + random() % 50) << 23);
      half[&value - x] = std::nearbyint(ordinary * 0x1p24f) * 0x1p-24f;  // a sum of fp16 numbers
    }
    if (kind == 4 && random() % 2) half[random() % 8] = INFINITY;
    wrong += check<float>(x, n) + check<BFloat16>(x, n) + check<Half>(half, n);
  }
  std::printf("%ld wrong\n", wrong);
  return wrong != 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("needs a CPU with fused multiply-add, without which the test takes hours")
    folder = tmp_path_factory.mktemp("divide")
    (folder / "divide.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'tests/support/cuda_emulation'}", "divide.cpp", "-o", "divide", "-pthread"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "divide"


# Every significand by every number of frames of up to one block of a sum, and in the slow tests by some large numbers.
@pytest.mark.parametrize(
    ("first", "last"),
    [(1, 65), *(pytest.param(n, n + 64, marks=pytest.mark.slow) for n in (65, 1473, 65505, 777001, 2**20 - 63))],
    ids=str,
)
def test_divide(program: Path, first: int, last: int):
    done = subprocess.run([program, str(first), str(last)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n")
