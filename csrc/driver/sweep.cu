// Times the fused kernel with every plan that the device allows: rows per tile and, by shared memory, blocks per
// multiprocessor; rows staged or not. One line per variant; the planner's choice is marked.
#include "case.h"
#include "check.h"
#include "timer.h"

namespace fastcompress::driver {
namespace {

struct Fused {
  cuda::PoolParams p{};
  cuda::BatchIn batch{};
  double bytes = 0;  // that a call reads and writes
};

template <class T>
double time_plan(Timer& timer, const Fused& fused, const cuda::PoolPlan& plan) {
  cuda::PoolParams p = fused.p;
  p.tile_rows = plan.tile_rows;
  p.pitch = plan.pitch;
  p.scratch.num_tiles = plan.num_tiles;
  return timer.seconds([&](cuda::Stream stream) {
    check(cuda::launch_prepare(fused.batch, p.sequences, p.scratch, stream), "prepare");
    check(cuda::launch_segment_pool_fwd(dtype_of<T>(), p, plan, stream), "segment_pool");
  });
}

template <class T>
void sweep_dtype(Timer& timer, const char* dtype, int64_t rows, int64_t width) {
  const cuda::Device device = cuda::current_device();
  Memory memory(true);
  // Features of a short clip, repeated: generating them takes longer than the sweep.
  Matrix<T> x = features<T>(std::min<int64_t>(rows, 3000), width, 0, 7);
  Values<T> data;
  while (int64_t(data.size()) < rows * width) data.insert(data.end(), x.data.begin(), x.data.end());
  data.resize(size_t(rows * width));
  Fused fused;
  fused.p.x = fused.p.keys = {memory.input(data), rows, width, width};
  fused.p.rule = {RuleKind::kLocalMax, 1, -1.0, 0, 0, 0, true};
  fused.p.sequences = {memory.output<int64_t>(1), memory.output<int64_t>(1), 1};
  fused.p.out = {memory.output<int64_t>(size_t(rows)), memory.output<int64_t>(size_t(rows)), memory.output<int32_t>(2),
                 rows, false};
  fused.p.values = memory.output<T>(data.size());
  fused.p.scratch = {memory.output<cuda::State>(1), memory.output<uint64_t>(size_t(rows)), rows};
  fused.batch = {memory.input(Values<int64_t>{0, rows}), true, 1, 0, rows, false};
  const cuda::PoolPlan planned = cuda::plan_pool(device, dtype_of<T>(), fused.p.x, fused.p.x, fused.p.rule);
  time_plan<T>(timer, fused, planned);
  const int64_t segments = int64_t(read(fused.p.scratch.state, 1)[0].total) - 1;
  fused.bytes = double((rows + segments) * width) * sizeof(T);
  const int64_t halo = cuda::rows_before(fused.p.rule) + cuda::rows_after(fused.p.rule) + cuda::kExtraRows;
  double best = 0;
  auto run = [&](cuda::PoolPlan plan) {
    plan.num_tiles = std::max<int64_t>(1, (rows + plan.tile_rows - 1) / plan.tile_rows);
    const double seconds = time_plan<T>(timer, fused, plan);
    const bool chosen = plan.staged == planned.staged && plan.tile_rows == planned.tile_rows;
    best = best == 0 ? seconds : std::min(best, seconds);
    std::printf(
        "{\"sweep\": \"segment_pool\", \"dtype\": \"%s\", \"rows\": %lld, \"width\": %lld, \"tile_rows\": %d, "
        "\"staged\": %s, \"shared_bytes\": %d, \"planned\": %s, \"seconds\": %.9f, \"GB_per_s\": %.1f}\n",
        dtype, static_cast<long long>(rows), static_cast<long long>(width), plan.tile_rows,
        plan.staged ? "true" : "false", plan.shared_bytes, chosen ? "true" : "false", seconds,
        fused.bytes / seconds / 1e9);
    std::fflush(stdout);
    return seconds;
  };
  const double ours = run(planned);
  cuda::PoolPlan plan = planned;
  plan.staged = false;
  plan.pitch = plan.shared_bytes = 0;
  for (const int tile : {8, 16, 32, 64, 96, int(cuda::kThreads - halo)}) {
    plan.tile_rows = tile;
    if (tile + halo <= cuda::kThreads) run(plan);
  }
  if (planned.staged) {
    plan = planned;
    for (int tile = 4; tile + halo <= cuda::kThreads; tile += tile < 16 ? 2 : 4) {
      plan.tile_rows = tile;
      plan.shared_bytes = int((tile + halo) * plan.pitch);
      if (plan.shared_bytes > plan.shared_limit) break;
      if (tile != planned.tile_rows) run(plan);
    }
  }
  std::printf("{\"sweep\": \"segment_pool\", \"dtype\": \"%s\", \"width\": %lld, \"planned_over_best\": %.3f}\n", dtype,
              static_cast<long long>(width), ours / best);
}

}  // namespace

void sweep(int64_t rows, int64_t width) {
  Timer timer(kFlushBytes, kRepetitions);
  sweep_dtype<BFloat16>(timer, "bfloat16", rows, width);
  sweep_dtype<float>(timer, "float32", rows, width);
}

}  // namespace fastcompress::driver
