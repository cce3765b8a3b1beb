#!/usr/bin/env bash
# The tests of the ops against a library that is built with AddressSanitizer and UBSan, in a copy under build/sanitize.
# usage: scripts/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
copy=build/sanitize

mkdir -p "$copy"
rm -rf "$copy/tests" "$copy/fastcompress"
cp -r csrc fastcompress tests setup.py pyproject.toml README.md "$copy/"
rm -f "$copy/fastcompress/_C.so"
cd "$copy"
FASTCOMPRESS_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
nm -D fastcompress/_C.so | grep __asan_report_load >/dev/null || { echo "_C.so is not instrumented"; exit 1; }

# Python itself is not instrumented, so the runtimes are loaded ahead of it; it never frees all it allocates. OpenMP's
# threads are waited for, or their stacks are taken for leaks.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$PWD"
"$python" -c 'import fastcompress; assert "build/sanitize" in fastcompress.__file__, fastcompress.__file__
from fastcompress._library import COMPILED; assert COMPILED'
"$python" -m pytest -q -x --capture=sys -p no:cacheprovider "$@" \
    ${SANITIZE_TESTS:-tests/test_distance.py tests/test_greedy.py tests/test_integrate_and_fire.py tests/test_boundaries.py tests/test_reduce.py tests/test_pool.py tests/test_packing.py tests/test_errors.py}
