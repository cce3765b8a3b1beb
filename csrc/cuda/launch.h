// The launchers of the kernels: each puts one kernel on the stream, of the current device, and returns at once.
#pragma once

#include "params.h"
#include "runtime.h"

namespace fastcompress::cuda {

Error launch_prepare(const BatchIn& batch, const Sequences& sequences, const Scratch& scratch, Stream stream);

Error launch_adjacent_distance_fwd(DType dtype, const DistanceParams& p, Stream stream);
Error launch_adjacent_distance_bwd(DType dtype, const DistanceParams& p, Stream stream);

// Two launches: norms, and a walk along each sequence with so many bytes of shared memory; 0 where the rows do not fit
// there, or cannot be copied 16 bytes at a time.
int64_t greedy_shared_bytes(const Device& device, DType dtype, const RowsIn& x);
Error launch_greedy_boundaries(DType dtype, const GreedyParams& p, int64_t shared_bytes, Stream stream);

// Two launches, three for a rule that needs a walk. `is_double`: the type of the distances.
Error launch_select(bool is_double, const SelectParams& p, Stream stream);
inline int64_t select_tiles(int64_t rows) { return rows == 0 ? 1 : (rows + kThreads - 1) / kThreads; }

Error launch_segment_reduce_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_weighted_mean_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_expand_fwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_max_bwd(DType dtype, const ReduceParams& p, Stream stream);
Error launch_segment_weighted_mean_bwd(DType dtype, const ReduceParams& p, Stream stream);

Error launch_integrate_rows_fwd(DType dtype, const IntegrateParams& p, Stream stream);
Error launch_integrate_rows_bwd(DType dtype, const IntegrateParams& p, Stream stream);

// After launch_prepare with select_tiles(p.rows) tiles.
Error launch_pack_map(const PackMapParams& p, Stream stream);
Error launch_pack_labels(const PackLabelsParams& p, Stream stream);
Error launch_pack_rows(DType dtype, const PackRowsParams& p, Stream stream);

// How the fused op cuts its rows.
struct PoolPlan {
  int tile_rows;
  int64_t num_tiles;
  bool staged;       // rows pass through shared memory
  int pitch;         // bytes between staged rows
  int shared_bytes;  // of the staged rows
  int shared_limit;  // of any plan on this device
};
// Whether one launch does the rule; what it leaves out runs as distances, selection and reduction.
inline bool is_fused(const Rule& rule) {
  constexpr int64_t kMaxOrder = 16;  // the halo of higher orders would outgrow the tile
  return !needs_walk(rule) && rule.lookahead() <= kMaxOrder;
}
PoolPlan plan_pool(const Device& device, DType dtype, const RowsIn& x, const RowsIn& keys, const Rule& rule);
Error launch_segment_pool_fwd(DType dtype, const PoolParams& p, const PoolPlan& plan, Stream stream);

}  // namespace fastcompress::cuda
