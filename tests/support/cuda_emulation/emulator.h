// Runs CUDA C++ kernels on the CPU, with one fibre per CUDA thread of a block and one OS thread per resident block. It
// replaces <cuda_runtime.h> when g++ compiles the kernels of csrc/cuda for the tests.
//
// It detects the following faults of a kernel:
// * The process ends with a message if not all threads reach a barrier or a warp operation, or if a warp operation
//   names lanes that do not take part.
// * Threads run in another order for every `schedule().seed`, so code that relies on warps in lockstep fails.
// * An asynchronous copy is executed when the thread waits for it, and not before.
// * Under AddressSanitizer shared memory has red zones.
// * ThreadSanitizer treats fibres as threads that only __syncthreads orders (votes and
//   shuffles do not order memory), so it reports a missing barrier as a race.
// It does not emulate weak memory ordering, timing, tensor cores or clusters.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the emulator switches fibres in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// ThreadSanitizer need not check the emulator's own bookkeeping.
#define EMULATOR_QUIET __attribute__((noinline, no_sanitize("thread")))
#else
#define EMULATOR_QUIET
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // under AddressSanitizer, which needs one OS thread: thread-local memory has no red zones
#else
#define __shared__ static thread_local
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

// The order and concurrency of blocks and threads; set before a launch.
struct Schedule {
  uint64_t seed = 0;   // 0: threads run in their order; else in a random order, a new one after every barrier
  int os_threads = 1;  // number of resident blocks
};
inline Schedule& schedule() {
  static Schedule instance;
  return instance;
}

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };
enum class WarpOp : uint8_t { kShuffle, kBallot };

struct AsyncCopy {
  void* target;
  const void* source;
};

// Saves the stack pointer and the registers that a call preserves in *from, and continues where `to` was saved.
// swapcontext also makes a system call for the signal mask, which takes six times as long.
extern "C" void fastcompress_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak fastcompress_emulator_switch
.type fastcompress_emulator_switch, @function
fastcompress_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastcompress_emulator_switch, .-fastcompress_emulator_switch
)");

struct Fibre {
  void* saved_stack;  // stack pointer while other fibres run
  char* stack;
  uint3 index;
  int number;
  State state;
  // The warp operation in which the fibre waits.
  unsigned mask;
  WarpOp op;
  int source;
  uint64_t given, received;
  int predicate;
  std::vector<AsyncCopy> copies;
#if defined(__SANITIZE_THREAD__)
  void* tsan;
  int barriers;  // number of barriers passed; two sync objects alternate, so that only one phase is ordered at a time
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
};

constexpr size_t kStackBytes = 128 << 10;

struct Block {
  std::vector<Fibre> fibres;
  std::unique_ptr<char[]> stacks;
  std::vector<uint4> dynamic_shared;
  dim3 size, grid;
  uint3 index;
  Fibre* current = nullptr;
  int running = 0, at_barrier = 0;
  const std::function<void()>* body = nullptr;
  void* scheduler;
#if defined(__SANITIZE_THREAD__)
  void* tsan;
  char begin, end, barrier_object[2];
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_size;
#endif
};

inline Block*& block() {
  static thread_local Block* instance = nullptr;
  return instance;
}

[[noreturn]] inline void die(const char* what) {
  const Block* b = block();
  if (b != nullptr && b->current != nullptr)
    std::fprintf(stderr, "emulator: %s (block %u, thread %d)\n", what, b->index.x, b->current->number);
  else
    std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

// ---- switching ----

EMULATOR_QUIET inline void switch_to_scheduler(bool done) {
  Block* b = block();
  Fibre* f = b->current;
  (void)done;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &f->fake_stack, b->stack_bottom, b->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  fastcompress_emulator_switch(&f->saved_stack, b->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &block()->stack_bottom, &block()->stack_size);
#endif
}

EMULATOR_QUIET inline void switch_to(Fibre* f) {
  Block* b = block();
  b->current = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b->fake_stack, f->stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  fastcompress_emulator_switch(&b->scheduler, f->saved_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b->fake_stack, nullptr, nullptr);
#endif
  b->current = nullptr;
}

EMULATOR_QUIET inline void run_fibre() {
  Block* b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b->stack_bottom, &b->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b->begin);
#endif
  (*b->body)();
  if (!b->current->copies.empty()) die("a thread ends with asynchronous copies that it has not waited for");
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&b->end);
#endif
  b->current->state = State::kDone;
  b->running--;
  switch_to_scheduler(true);
}

// ---- barriers ----

EMULATOR_QUIET inline void order_barrier(Fibre* f, bool arrive) {
#if defined(__SANITIZE_THREAD__)
  char* object = &block()->barrier_object[f->barriers & 1];
  if (arrive) {
    __tsan_release(object);
  } else {
    __tsan_acquire(object);
    f->barriers++;
  }
#endif
  (void)f, (void)arrive;
}

EMULATOR_QUIET inline int barrier(int predicate) {
  Fibre* f = block()->current;
  f->predicate = predicate;
  f->state = State::kAtBarrier;
  block()->at_barrier++;
  order_barrier(f, true);
  switch_to_scheduler(false);
  order_barrier(f, false);
  return int(f->received);
}

EMULATOR_QUIET inline void exchange(Fibre* warp, int lanes, unsigned mask) {
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fibre& f = warp[lane];
    uint64_t result = 0;
    if (f.op == WarpOp::kShuffle) {
      const bool there = f.source < lanes && (mask >> f.source & 1);
      result = there ? warp[f.source].given : 0xdeadbeefdeadbeefull;  // undefined on a GPU
    } else if (f.op == WarpOp::kBallot) {
      for (int k = 0; k < lanes; ++k)
        if ((mask >> k & 1) && warp[k].given) result |= uint64_t(1) << k;
    }
    f.received = result;
  }
  for (int lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) warp[lane].state = State::kReady;
}

EMULATOR_QUIET inline uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, int source) {
  Block* b = block();
  Fibre* f = b->current;
  Fibre* warp = &b->fibres[f->number & ~31];
  const int lanes = std::min<int>(32, int(b->fibres.size()) - (f->number & ~31));
  if (!(mask >> (f->number & 31) & 1)) die("the calling lane is not in the mask of its warp operation");
  f->mask = mask;
  f->op = op;
  f->given = value;
  f->source = source;
  f->state = State::kAtWarp;
  bool complete = true;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (warp[lane].state == State::kDone) die("a warp operation waits for a lane that has ended");
    if (warp[lane].state != State::kAtWarp || warp[lane].mask != mask)
      complete = false;
    else if (warp[lane].op != op)
      die("lanes of one mask are in different warp operations");
  }
  if (complete)
    exchange(warp, lanes, mask);
  else
    switch_to_scheduler(false);
  return f->received;
}

inline void let_others_run() {
  if (block() != nullptr) switch_to_scheduler(false);
  if (schedule().os_threads > 1) std::this_thread::yield();
}

// ---- launching ----

EMULATOR_QUIET inline void prepare(Block& b) {
  b.running = int(b.fibres.size());
  b.at_barrier = 0;
  for (int i = 0; i < b.running; ++i) {
    Fibre& f = b.fibres[i];
    f.number = i;
    f.index = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    f.state = State::kReady;
#if defined(__SANITIZE_THREAD__)
    f.barriers = 0;
#endif
    f.stack = b.stacks.get() + kStackBytes * i;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStackBytes);  // the frames of the last block may be poisoned
#endif
    // The stack looks as if the fibre had called the switch: six registers and the return address, and above them the
    // frame of a function that never returns. The alignment is that after a function call.
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(f.stack + kStackBytes) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(run_fibre);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f.saved_stack = top;
  }
}

EMULATOR_QUIET inline void complete_barrier(Block& b) {
  int holds = 0;
  for (Fibre& f : b.fibres)
    if (f.state == State::kAtBarrier && f.predicate) ++holds;
  for (Fibre& f : b.fibres) {
    if (f.state != State::kAtBarrier) continue;
    f.received = uint64_t(holds);
    f.state = State::kReady;
  }
  b.at_barrier = 0;
}

EMULATOR_QUIET inline void run_block(Block& b) {
  block() = &b;
#if defined(__SANITIZE_THREAD__)
  b.tsan = __tsan_get_current_fiber();
  __tsan_release(&b.begin);
#endif
  prepare(b);
  std::vector<Fibre*> order;
  for (Fibre& f : b.fibres) order.push_back(&f);
  uint64_t random = schedule().seed * 0x9e3779b97f4a7c15ull + b.index.x;
  while (b.running > 0) {
    if (schedule().seed != 0) {
      for (size_t i = order.size(); i-- > 1;) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i], order[(random >> 33) % (i + 1)]);
      }
    }
    bool moved = false;
    for (Fibre* f : order) {
      if (f->state != State::kReady) continue;
      switch_to(f);
      moved = true;
    }
    if (b.running > 0 && b.at_barrier == b.running) {  // threads that have ended do not count
      complete_barrier(b);
      moved = true;
    }
    if (!moved) {
      for (Fibre& f : b.fibres)
        if (f.state != State::kDone) b.current = &f;
      die("deadlock: threads wait at different barriers");
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b.end);
#endif
  block() = nullptr;
}

// Runs blocks in order until none is left.
EMULATOR_QUIET inline void run_blocks(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body,
                                      std::atomic<uint64_t>& next) {
  Block b;
  b.size = size;
  b.grid = grid;
  b.body = &body;
  const size_t threads = size_t(size.x) * size.y * size.z;
  b.fibres.resize(threads);
  b.stacks.reset(new char[kStackBytes * threads]);
#if defined(__SANITIZE_THREAD__)
  for (Fibre& f : b.fibres) f.tsan = __tsan_create_fiber(0);
#endif
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i; (i = next.fetch_add(1)) < blocks;) {
    b.dynamic_shared.assign((shared_bytes + 15) / 16,
                            uint4{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u});  // NaN
    b.dynamic_shared.shrink_to_fit();
    b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(b);
  }
#if defined(__SANITIZE_THREAD__)
  for (Fibre& f : b.fibres) __tsan_destroy_fiber(f.tsan);
#endif
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  std::atomic<uint64_t> next{0};
#if defined(__SANITIZE_ADDRESS__)
  const int os_threads = 1;
#else
  const int os_threads = schedule().os_threads;
#endif
  if (os_threads <= 1) {
    run_blocks(grid, size, shared_bytes, body, next);
    return;
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < os_threads; ++i) threads.emplace_back([&] { run_blocks(grid, size, shared_bytes, body, next); });
  for (std::thread& thread : threads) thread.join();
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

EMULATOR_QUIET inline uint3 thread_index() { return block()->current->index; }
EMULATOR_QUIET inline uint3 block_index() { return block()->index; }
EMULATOR_QUIET inline dim3 block_size() { return block()->size; }
EMULATOR_QUIET inline dim3 grid_size() { return block()->grid; }
EMULATOR_QUIET inline int lane() { return block()->current->number & 31; }
EMULATOR_QUIET inline void* dynamic_shared() { return block()->dynamic_shared.data(); }
EMULATOR_QUIET inline void start_copy(void* target, const void* source) {
  block()->current->copies.push_back({target, source});
}
EMULATOR_QUIET inline std::vector<AsyncCopy> take_copies() { return std::exchange(block()->current->copies, {}); }

}  // namespace emulator

// ---- what kernels call ----

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads() { emulator::barrier(0); }
inline int __syncthreads_or(int predicate) { return emulator::barrier(predicate) > 0; }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(emulator::warp_operation(emulator::WarpOp::kBallot, mask, predicate != 0, 0));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::unpack<T>(
      emulator::warp_operation(emulator::WarpOp::kShuffle, mask, emulator::pack(value), source & 31));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, emulator::lane() ^ with);
}
inline void __nanosleep(unsigned) { emulator::let_others_run(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

template <class T>
T atomicAdd(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, T value) {
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
