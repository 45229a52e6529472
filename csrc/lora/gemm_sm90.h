// The segmented-K GEMM for compute capability 9.0 (gemm_sm90.cuh): what it can run and how it is cut up, both pure host functions, and its
// launch.
#pragma once

#include <limits>

#include "../common/device.h"
#include "../common/numeric.h"
#include "gemm.h"

namespace peftops {
class Launcher;
}

namespace peftops::lora {

// ---- the contraction: every segment in tiles of its own, the last of them only as deep as needed ------------------------------------

constexpr int kDepthTile = 64;   // 128 bytes, one line of the widest swizzle
constexpr int kDepthBlock = 16;  // of one wgmma
constexpr int kDepthBlocks = kDepthTile / kDepthBlock;

struct DepthTiles {
  int32_t count;  // segments
  int32_t tiles[kMaxSegments];
  int32_t last_blocks[kMaxSegments];  // of the segment's last tile; beyond the depth TMA fills in zeros
  int32_t total;                      // tiles of all
};

inline DepthTiles depth_tiles(const GemmTask& task) {
  DepthTiles found{};
  found.count = task.count;
  for (int j = 0; j < task.count; ++j) {
    const int64_t tiles = ceil_div(task.segments[j].depth, kDepthTile);
    found.tiles[j] = static_cast<int32_t>(tiles);
    found.last_blocks[j] = static_cast<int32_t>(ceil_div(task.segments[j].depth - (tiles - 1) * kDepthTile, kDepthBlock));
    found.total += found.tiles[j];
  }
  return found;
}

// ---- the plan -----------------------------------------------------------------------------------------------------------------------

// Two blocks in a row of row tiles are a cluster: each loads half a tile of W, for both.
constexpr int kSm90Cluster = 2;

struct Sm90Tile {
  int rows, columns;
  int64_t shared_memory;
  int64_t cost;  // of a product, relative: the bytes that must come from the second cache for it
};

// Candidates: two warpgroups on one tile; each on a tile of its own, taking turns with the tensor cores.
constexpr Sm90Tile kSm90Tiles[] = {{128, 256, 217088, 4}, {128, 128, 207872, 5}};
constexpr int kSm90Candidates = 2;
constexpr int kSm90Threads = 384;

// Why these kernels cannot run a problem on any device with compute capability 9.0, or null.
inline const char* refuse_matrix(const void* data, int64_t stride, int64_t rows, int64_t columns) {
  if (reinterpret_cast<uintptr_t>(data) % 16) return "TMA needs matrices that start on 16 bytes";
  if (rows > 1 && stride % 8) return "TMA needs rows that start on 16 bytes";
  if (rows > 1 && stride < columns) return "TMA needs rows that do not overlap";
  if (rows > 1 && stride >= int64_t{1} << 39) return "TMA needs strides below 2^40 bytes";
  return nullptr;
}

inline const char* refuse_gemm_sm90(const GemmTask& task, int element_bytes, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;  // coordinates of the last tile fit 32 bits
  if (device.sm != 90) return "wgmma needs compute capability 9.0";
  if (element_bytes != 2) return "wgmma multiplies 16-bit types here";
  if (device.sm_count < kSm90Cluster) return "a cluster needs two multiprocessors";
  if (task.count < 1 || task.count > kMaxSegments) return "there are one to four segments";
  if (task.rows < 1 || task.columns < 1) return "the result is empty";
  if (task.rows > kMost || task.columns > kMost) return "rows and columns must fit 32 bits";
  int64_t tiles = 0;
  for (int j = 0; j < task.count; ++j) {
    const Segment& segment = task.segments[j];
    if (segment.depth < 1) return "a segment is empty";
    if (segment.depth > kMost) return "depths must fit 32 bits";
    if (segment.down != task.segments[0].down) return "all W must lie alike";
    if (const char* reason = refuse_matrix(segment.x, segment.x_stride, task.rows, segment.depth)) return reason;
    if (const char* reason = segment.down ? refuse_matrix(segment.w, segment.w_stride, segment.depth, task.columns)
                                          : refuse_matrix(segment.w, segment.w_stride, task.columns, segment.depth))
      return reason;
    tiles += ceil_div(segment.depth, kDepthTile);
  }
  if (tiles * kDepthTile > kMost) return "the contraction must fit 32 bits";
  if (task.mask.data && !task.segments[0].down) return "only a gradient is masked";
  return refuse_matrix(task.d, task.d_stride, task.rows, task.columns);
}

struct GemmSm90Plan {
  int candidate;
  int64_t row_tiles, column_tiles;  // row tiles of whole clusters
  int swizzle;                      // tiles of a wave that lie together, as far as that adds none
};

inline GemmSm90Plan plan_gemm_sm90(int candidate, int64_t rows, int64_t columns) {
  const Sm90Tile& tile = kSm90Tiles[candidate];
  GemmSm90Plan plan{candidate, round_up(ceil_div(rows, tile.rows), kSm90Cluster), ceil_div(columns, tile.columns), 1};
  for (int wanted = 8; wanted > 1 && plan.swizzle == 1; wanted /= 2)
    if (plan.row_tiles % (wanted * kSm90Cluster) == 0 && plan.column_tiles % wanted == 0) plan.swizzle = wanted;
  return plan;
}

// The candidate with the shortest time: waves of clusters, times a tile's products, times their cost.
inline GemmSm90Plan plan_gemm_sm90(int64_t rows, int64_t columns, const Device& device) {
  GemmSm90Plan best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int candidate = 0; candidate < kSm90Candidates; ++candidate) {
    const GemmSm90Plan plan = plan_gemm_sm90(candidate, rows, columns);
    const Sm90Tile& tile = kSm90Tiles[candidate];
    const int64_t waves = ceil_div(plan.row_tiles / kSm90Cluster * plan.column_tiles, device.sm_count / kSm90Cluster);
    const int64_t time = waves * tile.rows * tile.columns * tile.cost;
    if (time < least) least = time, best = plan;
  }
  return best;
}

// Launches a task that is not refused. `programmatic`: this may start while the kernel before it on the stream, itself an ordinary launch,
// still runs. Of what is read here, only operands of the adapter's segments (without any, all operands), bias and column_scale may then be
// that kernel's work.
template <class Element>
void gemm_sm90(const Launcher& launch, const GemmTask& task, const GemmSm90Plan& plan, bool programmatic);

}  // namespace peftops::lora
