// Chooses the tiles of segment_pool: how many rows each block processes, how many blocks share a multiprocessor, and
// whether rows are staged in shared memory.
//
// The plan has the least modelled cost of a call. With B blocks per multiprocessor, whose tiles have R rows of their
// own and W = R + halo rows to score, a wave of blocks takes the longest of
//   reading:   the bytes of B tiles, from memory (R rows) and from the second-level cache (W rows if they are staged;
//              otherwise R rows and, to score, W rows and the last row of each warp again), each at the share of a
//              multiprocessor of the bandwidth;
//   issuing:   the instructions of B tiles, on the schedulers that have a warp with work;
//   one block: its fixed latency (searches, barriers), the look-back over the tiles that run at the same time, reading
//              and issuing one after another, since nothing overlaps them if B is 1.
// The call takes as many waves as there are blocks for them. A tile has only as many rows as fill all waves, so that
// the last one is not short. The constants are for an H100 or H200, from the SASS of sm_90 and from data sheets; they
// are not measured.
#include <algorithm>

#include "launch.h"

namespace fastcompress::cuda {
namespace {

constexpr double kCacheBytesPerCycle = 24, kMemoryBytesPerCycle = 20;
// Rows that are read twice must be in the second-level cache the second time: half of its 50 MB.
constexpr int64_t kCacheBytes = 25 << 20;
constexpr double kFixedCycles = 3000;         // of a block
constexpr double kLookBackCycles = 700;       // per 32 tiles
constexpr double kFixedInstructions = 3000;   // of a warp: searches, decision, look-back, sequences
constexpr double kAverageInstructions = 145;  // of a lane, for three rows at one vector of 16 bytes
constexpr double kIssue = 0.75;               // instructions per cycle that a scheduler with several warps issues
constexpr double kUnstagedIssue = 0.5;        // the same where rows are scored in global memory
constexpr int kSchedulers = 4;
constexpr int kMaxBlocks = 4;        // more would need fewer registers (the launch bounds of the kernel)
constexpr int64_t kReserved = 1024;  // shared memory per block that CUDA reserves
constexpr int64_t kMinRows = 4;      // of a tile; with fewer, the halo and the look-back dominate

// Instructions of a lane per pair of rows and step of 32 columns, and lanes per pair.
struct Scoring {
  double instructions;
  int lanes;
};
Scoring scoring(DType dtype) {
  if (dtype == DType::kDouble) return {18, 16};
  if (dtype == DType::kFloat) return {19.25, 8};
  return {24.25, 4};  // a group of 8 lanes scores two pairs
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Bytes between staged rows. Two groups of lanes that score half types read rows two apart in one phase, which must be
// in different banks; groups for other types read 128 bytes of one row.
int64_t pitch_of(DType dtype, int64_t row_bytes) {
  if (size_of(dtype) > 2) return row_bytes;
  while (row_bytes % 64 != 32) row_bytes += 16;
  return row_bytes;
}

struct Tiles {
  int64_t rows, window;
  int blocks;  // per multiprocessor
  bool staged, scored;
};

double call_cycles(DType dtype, int64_t count, int64_t width, const Tiles& tiles, int processors) {
  const Scoring score = scoring(dtype);
  const double row_bytes = double(width * size_of(dtype));
  const int64_t number = divide_up(count, tiles.rows), slots = int64_t(processors) * tiles.blocks;
  const double blocks = double(std::min<int64_t>(tiles.blocks, divide_up(number, processors)));
  double cycles = kFixedInstructions * kWarps;  // of the schedulers, to issue one tile
  cycles += double(divide_up(tiles.rows, 3)) * row_bytes / 512 * kAverageInstructions;
  const double rate = tiles.scored && !tiles.staged ? kUnstagedIssue : kIssue;
  cycles /= kSchedulers * rate;
  double rows_read = double(tiles.rows);
  if (tiles.scored) {
    // Warps with work: with few rows twice as many lanes score a row, each for half of the time.
    double warps = double(divide_up(tiles.window * score.lanes, 32));
    const double instructions = warps * double(divide_up(width, kLanes)) * score.instructions;
    if (2 * tiles.window * score.lanes <= kThreads) warps *= 2;
    cycles += instructions / std::min<double>(kSchedulers, blocks * warps) / rate;
    rows_read = double(tiles.window);
    if (!tiles.staged) rows_read += double(tiles.rows) + double(tiles.window * score.lanes) / 32;
  }
  const double reading =
      row_bytes * std::max(rows_read / kCacheBytesPerCycle, double(tiles.rows) / kMemoryBytesPerCycle);
  const double look_back = kLookBackCycles * double(divide_up(std::min(number, slots), 32));
  return double(divide_up(number, slots)) *
         std::max({blocks * reading, blocks * cycles, kFixedCycles + look_back + reading + cycles});
}

}  // namespace

PoolPlan plan_pool(const Device& device, DType dtype, const RowsIn& x, const RowsIn& keys, const Rule& rule) {
  const int64_t size = size_of(dtype), halo = pool_halo(rule), fixed = pool_static_shared(dtype);
  const int64_t count = std::max<int64_t>(1, x.count);
  PoolPlan plan{};
  plan.shared_limit = int(device.shared_per_block - fixed);
  auto consider = [&](int64_t most, int blocks, int64_t pitch) {
    const int64_t slots = int64_t(device.processors) * blocks, waves = divide_up(count, slots * most);
    const int64_t rows = std::min(most, std::max(kMinRows, divide_up(count, slots * waves)));
    const double cost = call_cycles(dtype, count, x.width,
                                    {rows, rows + halo, blocks, pitch > 0, rule.needs_distance()}, device.processors);
    if (plan.tile_rows > 0 && cost >= plan.cycles) return;
    plan.tile_rows = int(rows);
    plan.staged = pitch > 0;
    plan.pitch = int(pitch);
    plan.cycles = cost;
  };
  // Staging pays off only if rows are read twice, which they are not for Uniform or with separate keys.
  const bool own_keys = keys.data != x.data || keys.width != x.width || keys.stride != x.stride;
  const bool read_twice = rule.needs_distance() && !own_keys;
  int64_t most_unstaged = kThreads - halo;
  if (read_twice && x.width > 0) {
    const int64_t cached = kCacheBytes / (int64_t(device.processors) * kMaxBlocks * x.width * size);
    most_unstaged = std::min(most_unstaged, std::max(kMinRows, cached));
  }
  consider(most_unstaged, kMaxBlocks, 0);
  if (read_twice && x.width > 0 && is_aligned(x, size)) {
    const int64_t pitch = pitch_of(dtype, x.width * size);
    for (int blocks = 1; blocks <= kMaxBlocks; ++blocks) {
      const int64_t room =
          std::min<int64_t>(device.shared_per_processor / blocks - kReserved, device.shared_per_block) - fixed;
      const int64_t most = std::min<int64_t>(room / pitch, kThreads) - halo;
      if (most >= kMinRows) consider(most, blocks, pitch);
    }
  }
  plan.shared_bytes = int((plan.tile_rows + halo) * plan.pitch);
  plan.num_tiles = divide_up(count, plan.tile_rows);
  return plan;
}

}  // namespace fastcompress::cuda
