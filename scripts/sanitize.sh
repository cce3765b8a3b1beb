#!/usr/bin/env bash
# Run tests under sanitizers. usage: scripts/sanitize.sh PYTHON [KIND ...]; the default is all kinds.
#   address   the tests of the ops under AddressSanitizer and UBSan
#   thread    the tests of threads under ThreadSanitizer
#   emulated  the emulated CUDA kernels under all three
# The first two build the CPU library in build/sanitize-KIND.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
root=$PWD

OPS="tests/ops/test_adjacent_distance.py tests/ops/test_greedy_segments.py tests/ops/test_integrate_and_fire.py
    tests/ops/test_select_boundaries.py tests/ops/test_segment_reduce.py tests/ops/test_segment_pool.py tests/ops/test_pack.py tests/ops/test_pack_errors.py
    tests/ops/test_errors.py"
BY_ISA="tests/ops/test_adjacent_distance.py tests/ops/test_segment_reduce.py tests/ops/test_segment_pool.py"
THREADS="tests/ops/test_threads.py tests/ops/test_concurrency.py"

# build KIND SANITIZERS SYMBOL: copy the sources, change to the copy and build the library, which must contain SYMBOL.
build() {
    local copy=$root/build/sanitize-$1
    mkdir -p "$copy"
    rm -rf "$copy/tests" "$copy/fastcompress"
    cp -rp csrc fastcompress tests setup.py pyproject.toml README.md "$copy/" # -p keeps objects that are up to date
    rm -f "$copy/fastcompress/_C.so"
    cd "$copy"
    FASTCOMPRESS_SANITIZE=$2 "$python" setup.py -q build_ext --inplace
    nm -D fastcompress/_C.so | grep "$3" >/dev/null || { echo "_C.so is not instrumented"; exit 1; }
    export PYTHONPATH=$PWD
}

# Python itself is not instrumented, so the runtime of the sanitizer must be preloaded.
runtime() { gcc -print-file-name="$1.so"; }

loads_the_copy() {
    "$python" -c 'import fastcompress; assert "build/sanitize" in fastcompress.__file__, fastcompress.__file__
from fastcompress.dispatch.library import COMPILED; assert COMPILED'
}

# must_find TEXT COMMAND: run the command, which must fail and print TEXT because of a seeded bug. This shows that the
# sanitizer works.
must_find() {
    local words=$1
    shift
    if "$@" >found.txt 2>&1 || ! grep -q "$words" found.txt; then
        tail -n 50 found.txt
        echo "the sanitizer did not find the seeded bug: $words"
        exit 1
    fi
    echo "found the seeded bug: $words"
}

# Leak detection is off, since Python never frees all its memory. The second run uses the portable kernels, which differ
# from those of other instruction sets only in the width of a step.
address() (
    build address address,undefined __asan_report_load
    export LD_PRELOAD="$(runtime libasan) $(runtime libubsan) $(runtime libstdc++)"
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
    loads_the_copy
    "$python" -m pytest -q -x -n 2 --capture=sys -p no:cacheprovider ${SANITIZE_TESTS:-$OPS}
    FASTCOMPRESS_CPU_ISA=portable "$python" -m pytest -q -x -n 2 --capture=sys -p no:cacheprovider $BY_ISA
    trap 'find build -name "*segment_reduce.cpp.o" -delete' EXIT
    sed -i 's/size_t(end - begin) \* width/size_t(end - begin + 1) * width/' csrc/cpu/segment_reduce.cpp
    LD_PRELOAD='' FASTCOMPRESS_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
    must_find "AddressSanitizer: heap-buffer-overflow" "$python" -c '
import torch, fastcompress
torch.ops.fastcompress.segment_expand(torch.ones(1, 512), torch.tensor([0]), torch.tensor([2]), 4, "mean")'
)

# ThreadSanitizer does not see how the threads of OpenMP synchronize, since OpenMP is not instrumented. With
# FASTCOMPRESS_STD_THREADS the library starts threads itself; this checks the library's use of threads, not OpenMP's.
with_thread_sanitizer() {
    LD_PRELOAD="$(runtime libtsan) $(runtime libstdc++)" OMP_NUM_THREADS=1 \
        TSAN_OPTIONS="halt_on_error=1:exitcode=66:suppressions=$root/scripts/tsan.supp" setarch -R "$@"
}

thread() (
    build thread thread __tsan_read
    with_thread_sanitizer "$python" -m pytest -q -x --capture=sys -p no:cacheprovider $THREADS \
        -k "concurrent or many_threads or definition or gradients or (chunks_and_threads and bfloat16)"
    trap 'find build -name "*segment_pool.cpp.o" -delete' EXIT
    sed -i 's/memory_order_release/memory_order_relaxed/' csrc/cpu/segment_pool.cpp
    FASTCOMPRESS_SANITIZE=thread "$python" setup.py -q build_ext --inplace
    must_find "ThreadSanitizer: data race" with_thread_sanitizer "$python" -m pytest -q -x --capture=sys \
        -p no:cacheprovider tests/ops/test_threads.py -k concurrent_callers
)

emulated() {
    "$python" -m pytest -q -x -n 2 --dist load -p no:cacheprovider -m sanitizer --run-sanitizers \
        tests/csrc/test_cuda_emulation.py tests/csrc/test_greedy_emulation.py
}

for kind in ${*:-address thread emulated}; do
    "$kind"
done
