// How a LoRA problem is cut up: pure host functions of the problem, never of the thread count, so that results do not depend on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/device.h"
#include "../common/index.h"

namespace peftops::lora {

// ---- CPU -------------------------------------------------------------------------------------------------------------

constexpr int64_t kRowBlock = 64;       // tokens per task, and per pass of a column panel
constexpr int64_t kColumnChunk = 256;   // features unpacked at a time: 64 KiB of float32 beside 64 rows
constexpr int64_t kRankBlock = 64;      // ranks summed at a time
constexpr int64_t kExpandColumns = 1024;  // features per up-projection task
constexpr int64_t kSmallRows = 16;      // up to here, without grad, our own kernel makes the base product as well
constexpr int64_t kSmallBlock = 8;      // weight rows per step of that kernel
constexpr int64_t kSmallPiece = 1536;    // bytes of a row per step of that kernel, for more than four rows

// A packed weight (packed_kernels.h).
constexpr int64_t kPackedLanes = 16;                // weight rows side by side: a block
constexpr int64_t kPackedStep = 2 * kPackedLanes;   // numbers of a block that lie together
constexpr int64_t kPackedRows = 64;                 // rows that share a piece of the weight while it is in the first cache
constexpr int64_t kPackedPiece = 8192;              // bytes of such a piece of a block
constexpr int64_t kPackedAhead = 2048;              // bytes: how far ahead of its use the weight is asked for
constexpr int64_t kPackedChunk = 256;               // steps of x that a task lays out in strips

// Features per step of the few-row kernel. More than four tokens go over a weight row several times, so they go piece by piece: a piece
// of eight weight rows and sixteen tokens fits the first cache. Four or fewer go over it once.
inline int64_t small_piece(int64_t rows, int64_t features, int64_t element_bytes) {
  return rows <= 4 ? features : kSmallPiece / element_bytes;
}

// Width of the column panels of the gradient pass: about 16 panels, so that many threads have work, but no narrower than 128,
// because each panel writes a partial [rows, rank] sum.
inline int64_t gradient_panel(int64_t features) {
  const int64_t width = round_up(ceil_div(features, 16), 64);
  return width < 128 ? 128 : min_of(width, kColumnChunk);
}

// ---- CUDA ------------------------------------------------------------------------------------------------------------
// What may be run is apart from what is best: `refuse_*` gives the reason why a device cannot run a candidate, or null; `plan_*` takes
// the best of the rest. element_bytes is of what is multiplied: 2 on tensor cores, 4 in float32. terms: how many 16-bit numbers a factor's
// number is the sum of; with more than one, sums are to be as accurate as in float32.

constexpr int kThreads = 128;
constexpr int kFinishThreads = 256;
constexpr int kGpuTile = 64;                   // tokens, columns and contraction of a tile
constexpr int kShrinkRanks[] = {16, 64, 128};  // ranks of a tile: candidates
constexpr int kGradientRanks[] = {16, 64};
constexpr int kDeltaStride = kGpuTile + 8;  // float32 between rows of the up-projection: two lanes of a half warp share no bank
constexpr int64_t kBlocksPerSm = 4;             // enough loads in flight to fill the memory's latency
constexpr int64_t kFillingSplits = 16;          // of a contraction, to fill the device; each split writes its own float32 sums
constexpr int64_t kMaxSplits = 64;              // and to keep its sums accurate
constexpr int64_t kMaxRun = 2048;               // products in one float32 sum, whose rounding grows with them; 16-bit results hide it
constexpr int64_t kMaxColumnsPerBlock = 1024;   // of the up-projection, which loads its ranks once per block
constexpr int64_t kMaxGridY = 65535;

constexpr int64_t at_least(int64_t value, int64_t least) { return value < least ? least : value; }

// Parts of a contraction, none empty, whole tiles long: as many as fill the device where `blocks` blocks work on each, and in float32
// as many as keep its sums short.
struct Split {
  int64_t count, length;
};

inline Split plan_split(int64_t length, int64_t blocks, int element_bytes, const Device& device) {
  const int64_t tiles = at_least(ceil_div(length, kGpuTile), 1);
  const int64_t filling = min_of(kFillingSplits, at_least(kBlocksPerSm * device.sm_count / at_least(blocks, 1), 1));
  const int64_t accurate = element_bytes == 2 ? 1 : min_of(kMaxSplits, ceil_div(length, kMaxRun));
  const int64_t each = ceil_div(tiles, min_of(at_least(filling, accurate), tiles));
  return {ceil_div(tiles, each), each * kGpuTile};
}

constexpr int accuracy_bytes(int element_bytes, int terms) { return terms > 1 ? 4 : element_bytes; }

// S = c keep(X) F^T. X is read once per block of ranks, so the fewest blocks win, then the narrowest tile.
struct ShrinkPlan {
  int candidate;  // of kShrinkRanks
  int64_t row_blocks, rank_blocks;
  Split split;
  int64_t shared_memory;
};

// A factor's tile holds 64 numbers a line, `down` as well, where a line has one number for each rank.
PEFTOPS_HOST_DEVICE constexpr int factor_tile_elements(int ranks, bool down) {
  return kGpuTile * (down && ranks < kGpuTile ? kGpuTile : ranks);
}

inline int64_t shrink_memory(int ranks, bool down, int element_bytes, int terms = 1) {
  return 2 * int64_t{kGpuTile * kGpuTile + terms * factor_tile_elements(ranks, down)} * element_bytes;
}

inline const char* refuse_shrink(int ranks, bool down, int element_bytes, const Device& device, int terms = 1) {
  if (device.sm < 80) return "mma.sync of bfloat16 needs compute capability 8.0";
  if (ranks > 64 && (element_bytes > 2 || terms > 1))
    return "the sums and the tiles on their way of 128 float32 ranks do not fit the registers";
  if (shrink_memory(ranks, down, element_bytes, terms) > device.shared_memory) return "the tiles do not fit the shared memory";
  return nullptr;
}

inline ShrinkPlan plan_shrink(int64_t rows, int64_t depth, int64_t rank, bool down, int element_bytes, const Device& device,
                              int terms = 1) {
  ShrinkPlan plan{};
  int64_t fewest = 0;
  for (int candidate = 0; candidate < 3; ++candidate) {
    const int ranks = kShrinkRanks[candidate];
    const int64_t blocks = at_least(ceil_div(rank, ranks), 1);
    if (refuse_shrink(ranks, down, element_bytes, device, terms) || (fewest && blocks >= fewest)) continue;
    fewest = blocks;
    plan.candidate = candidate, plan.rank_blocks = blocks, plan.shared_memory = shrink_memory(ranks, down, element_bytes, terms);
  }
  plan.row_blocks = ceil_div(rows, kGpuTile);
  plan.split = plan_split(depth, plan.row_blocks * plan.rank_blocks, accuracy_bytes(element_bytes, terms), device);
  return plan;
}

// Y += keep(S F^T). Long runs of columns load S less often; short ones fill the device.
struct ExpandPlan {
  int64_t row_blocks, column_blocks, columns_per_block;
  int64_t shared_memory;
};

inline ExpandPlan plan_expand(int64_t rows, int64_t columns, int element_bytes, const Device& device, int terms = 1) {
  const int64_t row_blocks = ceil_div(rows, kGpuTile);
  const int64_t wanted = at_least(ceil_div(kBlocksPerSm * device.sm_count, at_least(row_blocks, 1)), 1);
  const int64_t filling = min_of(round_up(ceil_div(columns, wanted), kGpuTile), kMaxColumnsPerBlock);
  const int64_t each = at_least(at_least(filling, round_up(ceil_div(columns, kMaxGridY), kGpuTile)), kGpuTile);
  return {row_blocks, ceil_div(columns, each), each,
          2 * terms * int64_t{kGpuTile} * kGpuTile * element_bytes + int64_t{kGpuTile} * kDeltaStride * 4};
}

// gradient = keep(G)^T S. G is read once per block of ranks; with 128 features a block (64 in float32), S is read less often.
struct GradientPlan {
  int candidate;  // of kGradientRanks
  int64_t feature_blocks, rank_blocks;
  Split split;
  int64_t shared_memory;
};

inline GradientPlan plan_gradient(int64_t rows, int64_t features, int64_t rank, int element_bytes, const Device& device, int terms = 1) {
  GradientPlan plan{};
  plan.candidate = rank > kGradientRanks[0];
  const int ranks = kGradientRanks[plan.candidate], block = element_bytes == 2 ? 2 * kGpuTile : kGpuTile;
  plan.feature_blocks = ceil_div(features, block);
  plan.rank_blocks = ceil_div(rank, ranks);
  plan.split = plan_split(rows, plan.feature_blocks * plan.rank_blocks, accuracy_bytes(element_bytes, terms), device);
  plan.shared_memory = 2 * int64_t{kGpuTile * block + terms * factor_tile_elements(ranks, true)} * element_bytes;
  return plan;
}

// D = sum_j X_j W_j^T + bias in one kernel. It moves whole tiles, four on their way at a time.
constexpr int kGemmTile = 128;  // rows and columns of a block
constexpr int kGemmDepth = 32;  // of the contraction
constexpr int kGemmStages = 4;
constexpr int64_t kGemmMemory = int64_t{kGemmStages} * 2 * kGemmTile * kGemmDepth * 2;
constexpr int64_t kGemmGroup = 8;  // rows of blocks that go down the columns together, so that what they read meets in the second cache

struct GemmPlan {
  int64_t row_blocks, column_blocks;
};

inline const char* refuse_gemm_sm80(int64_t rows, int64_t columns, const Device& device) {
  if (device.sm < 80) return "mma.sync of bfloat16 needs compute capability 8.0";
  if (kGemmMemory > device.shared_memory) return "the tiles do not fit the shared memory";
  if (ceil_div(rows, kGemmTile) > std::numeric_limits<int32_t>::max() / at_least(ceil_div(columns, kGemmTile), 1))
    return "the result has more tiles than CUDA launches blocks";
  return nullptr;
}

inline GemmPlan plan_gemm_sm80(int64_t rows, int64_t columns) { return {ceil_div(rows, kGemmTile), ceil_div(columns, kGemmTile)}; }

// The tile of block `index` of row_blocks * column_blocks.
struct GemmBlock {
  int32_t row, column;
};

PEFTOPS_HOST_DEVICE GemmBlock gemm_block(uint32_t index, uint32_t row_blocks, uint32_t column_blocks) {
  const uint32_t group = kGemmGroup < row_blocks ? kGemmGroup : row_blocks;
  const uint32_t first = index / (group * column_blocks) * group, within = index % (group * column_blocks);
  const uint32_t rows = group < row_blocks - first ? group : row_blocks - first;
  return {static_cast<int32_t>(first + within % rows), static_cast<int32_t>(within / rows)};
}

// How X W^T + S F^T is made: by the vendor's GEMM and the up-projection after it, or by one GEMM of both.
enum class Linear { vendor, gemm_sm80, gemm_sm90 };
constexpr const char* kLinearNames[] = {"vendor", "gemm_sm80", "gemm_sm90"};
constexpr int kLinears = 3;

// Why each cannot be run; null where it can.
struct LinearRefusals {
  const char* of[kLinears];
};

// The best of those that can be run. `whole`: no operand must be copied, which for W would cost more than is gained. The GEMM for 8.0 was
// measured nowhere, so the vendor's stays.
inline Linear plan_linear(const LinearRefusals& refused, bool whole) {
  return whole && !refused.of[static_cast<int>(Linear::gemm_sm90)] ? Linear::gemm_sm90 : Linear::vendor;
}

// The one of that name, or -1.
inline int linear_named(const char* name) {
  for (int i = 0; i < kLinears; ++i)
    if (std::strcmp(name, kLinearNames[i]) == 0) return i;
  return -1;
}

}  // namespace peftops::lora
