#!/usr/bin/env bash
# The tests of the ops under AddressSanitizer and UBSan, and those of threads under ThreadSanitizer: the CPU library,
# built in a copy under build/sanitize-KIND, and then the CUDA kernels in their emulator.
# usage: scripts/sanitize.sh PYTHON [KIND ...]; a KIND is address, thread or emulated; none: all of them
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
root=$PWD

OPS="tests/ops/test_adjacent_distance.py tests/ops/test_greedy_segments.py tests/ops/test_integrate_and_fire.py tests/ops/test_select_boundaries.py
    tests/ops/test_segment_reduce.py tests/ops/test_segment_pool.py tests/ops/test_pack.py tests/ops/test_pack_errors.py
    tests/ops/test_errors.py"
BY_ISA="tests/ops/test_adjacent_distance.py tests/ops/test_segment_reduce.py tests/ops/test_segment_pool.py"
THREADS="tests/ops/test_threads.py tests/ops/test_concurrency.py"

# build KIND SANITIZERS SYMBOL: goes to a copy of the sources and builds the library there; SYMBOL must be in it.
build() {
    local copy=$root/build/sanitize-$1
    mkdir -p "$copy"
    rm -rf "$copy/tests" "$copy/fastcompress"
    cp -rp csrc fastcompress tests setup.py pyproject.toml README.md "$copy/" # -p: what is built already stays
    rm -f "$copy/fastcompress/_C.so"
    cd "$copy"
    FASTCOMPRESS_SANITIZE=$2 "$python" setup.py -q build_ext --inplace
    nm -D fastcompress/_C.so | grep "$3" >/dev/null || { echo "_C.so is not instrumented"; exit 1; }
    export PYTHONPATH=$PWD
}

# Python itself is not instrumented, so a runtime is loaded ahead of it.
runtime() { gcc -print-file-name="$1.so"; }

loads_the_copy() {
    "$python" -c 'import fastcompress; assert "build/sanitize" in fastcompress.__file__, fastcompress.__file__
from fastcompress.dispatch.library import COMPILED; assert COMPILED'
}

# Runs what is given; it must fail, and say so: a fault that was put in, or the tests have shown nothing.
must_find() {
    local words=$1
    shift
    if "$@" >found.txt 2>&1 || ! grep -q "$words" found.txt; then
        tail -n 50 found.txt
        echo "a fault that was put in was not found: $words"
        exit 1
    fi
    echo "found, as it must be: $words"
}

# Python never frees all it allocates, so leaks are not looked for. A second time by the kernels for any CPU; those for
# other instructions than this CPU's best differ from them in the width of a step.
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

# The library starts threads of its own (FASTCOMPRESS_STD_THREADS): OpenMP's are not instrumented, so that
# ThreadSanitizer does not see what they wait for. It stands for the library's own use of threads, not for OpenMP's.
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
