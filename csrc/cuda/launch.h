// Launchers of the kernels. Each enqueues its kernels on a stream of the current device and returns immediately.
#pragma once

#include "params.h"
#include "runtime.h"

namespace fastcompress::cuda {

// Returns whether the current device overlaps a kernel that launch_dependent launches with the one before it, and the
// kernels are compiled for that.
bool launches_overlap();

Error launch_prepare(const BatchIn& batch, const Sequences& sequences, const Scratch& scratch, Stream stream,
                     const AudiosIn& audios = {});

Error launch_adjacent_distance_fwd(DType dtype, const DistanceParams& p, Stream stream);
Error launch_adjacent_distance_bwd(DType dtype, const DistanceParams& p, Stream stream);

Error launch_banded_distance(DType dtype, const BandParams& p, Stream stream);

// Two launches: the norms of all rows, and the walk along each sequence. greedy_shared_bytes returns the shared memory
// of the walk in bytes, or 0 if the rows do not fit there or cannot be copied 16 bytes at a time.
int64_t greedy_shared_bytes(const Device& device, DType dtype, const RowsIn& x);
Error launch_greedy_boundaries(DType dtype, const GreedyParams& p, int64_t shared_bytes, Stream stream);

// Two launches, or three for a rule that needs a walk. `is_double`: distances are fp64, else fp32.
Error launch_select(bool is_double, const SelectParams& p, Stream stream);
inline int64_t select_tiles(int64_t rows) { return rows == 0 ? 1 : (rows + kThreads - 1) / kThreads; }

// plan_variance sets the number of thread blocks and their scratch memory. Two launches. `is_double`: distances are
// fp64, else fp32.
void plan_variance(const Device& device, VarianceParams& p);
Error launch_min_variance(bool is_double, const VarianceParams& p, Stream stream);

Error launch_segment_reduce_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_weighted_mean_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_expand_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_max_bwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_weighted_mean_bwd(DType dtype, const ReduceParams& p, Stream stream);

Error launch_integrate_rows_fwd(DType dtype, const IntegrateParams& p, Stream stream);
Error launch_integrate_rows_bwd(DType dtype, const IntegrateParams& p, Stream stream);

// Needs launch_prepare with select_tiles(p.rows) tiles before it.
Error launch_pack_map(const PackMapParams& p, Stream stream);
Error launch_pack_labels(const PackLabelsParams& p, Stream stream);
Error launch_pack_rows(DType dtype, const PackRowsParams& p, Stream stream);

// Tiles and shared memory of the fused op.
struct PoolPlan {
  int tile_rows;
  int64_t num_tiles;
  bool staged;       // rows are copied to shared memory
  int pitch;         // bytes between staged rows
  int shared_bytes;  // size of the staged rows
  int shared_limit;  // largest shared_bytes of any plan on this device
  double cycles;     // modelled cost (pool_plan.cpp)
};
// Returns whether segment_pool runs the rule in one launch; other rules run as distances, selection and reduction.
inline bool is_fused(const Rule& rule) {
  constexpr int64_t kMaxOrder = 16;  // for higher orders the halo would be larger than the tile
  return !needs_walk(rule) && rule.lookahead() <= kMaxOrder;
}
// Bytes of static shared memory of the kernel.
int64_t pool_static_shared(DType dtype);
PoolPlan plan_pool(const Device& device, DType dtype, const RowsIn& x, const RowsIn& keys, const Rule& rule);
Error launch_segment_pool_fwd(DType dtype, const PoolParams& p, const PoolPlan& plan, Stream stream);

}  // namespace fastcompress::cuda
