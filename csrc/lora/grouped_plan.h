// How grouped LoRA is cut up on a GPU: pure host functions of shapes and device. Which adapter a token has is known on the device alone,
// so grids hold what the worst assignment needs, and blocks without work return at once.
#pragma once

#include "plan.h"

namespace peftops::lora {

constexpr int kGroupThreads = 256;
constexpr int64_t kFewTokens = kGroupThreads;      // up to here one block compares every token with every other
constexpr int kListThreads = 512;
constexpr int64_t kLeastExpandColumns = 256;       // of a block, which first waits for its tile, its tokens and their sums
constexpr int kGroupedFinishElements = 1024;       // of a block of kFinishThreads

// Tokens lie in groups: one for each adapter, then those whose id names none, then those without an adapter.
constexpr int64_t groups_of(int64_t adapters) { return adapters + 2; }

// A tile holds tokens of one group, so each group may leave its last one unfilled.
inline int64_t tile_slots(int64_t rows, int64_t adapters, int64_t tile_rows) {
  return rows / tile_rows + min_of(groups_of(adapters), rows);
}

// Parts of the tokens, `length` long, for the gradients; an adapter without a token has an empty one, which writes zeros.
inline int64_t part_slots(int64_t rows, int64_t adapters, int64_t length) { return rows / length + adapters; }

// ---- few tokens ------------------------------------------------------------------------------------------------------
// Most adapters have one, so reading the adapters is the work: narrow tiles, and more bytes in flight.

constexpr int64_t kFewTileRows = 16;
constexpr int kFewRanks[] = {16, 64};   // of a tile
constexpr int64_t kFewDepth = 256;      // of a step: a tile for each warp
constexpr int64_t kFewColumns = 256;    // of a block

// Why the kernels for few tokens do not take a forward pass, or null.
inline const char* refuse_few(int64_t rows, int64_t columns, int element_bytes, const Device& device) {
  if (device.sm < 80) return "mma.sync of bfloat16 needs compute capability 8.0";
  if (element_bytes > 2) return "a warp's float32 tile does not fit the registers";
  if (rows > kFewTokens) return "there are many tokens";
  if (ceil_div(columns, kFewColumns) > kMaxGridY) return "CUDA does not launch as many blocks of columns";
  return nullptr;
}

struct FewShrinkPlan {
  int candidate;  // of kFewRanks
  int64_t tiles, rank_blocks;
  Split split;
  int64_t shared_memory;
};

inline FewShrinkPlan plan_few_shrink(int64_t rows, int64_t depth, int64_t rank, int64_t adapters, const Device& device) {
  FewShrinkPlan plan{};
  plan.candidate = rank > kFewRanks[0];
  const int64_t ranks = kFewRanks[plan.candidate], steps = at_least(ceil_div(depth, kFewDepth), 1);
  plan.tiles = tile_slots(rows, adapters, kFewTileRows);
  plan.rank_blocks = at_least(ceil_div(rank, ranks), 1);
  const int64_t blocks = at_least(ceil_div(rows, kFewTileRows) * plan.rank_blocks, 1);  // where one adapter has all tokens
  const int64_t filling = min_of(kFillingSplits, at_least(kBlocksPerSm * device.sm_count / blocks, 1));
  const int64_t each = ceil_div(steps, min_of(filling, steps));
  plan.split = {ceil_div(steps, each), each * kFewDepth};
  plan.shared_memory = kFewDepth * (kFewTileRows + ranks) * 2;
  return plan;
}

struct FewExpandPlan {
  int candidate;  // of kFewRanks
  int64_t tiles, column_blocks;
  int64_t shared_memory;
};

inline FewExpandPlan plan_few_expand(int64_t rows, int64_t columns, int64_t rank, int64_t adapters) {
  return {rank > kFewRanks[0], tile_slots(rows, adapters, kFewTileRows), ceil_div(columns, kFewColumns),
          (kFewColumns + kFewTileRows) * kGpuTile * 2};
}

// ---- any number of tokens --------------------------------------------------------------------------------------------

// S = c_l X A_l^T. The worst assignment is one adapter for all: it has the fewest tiles, so the contraction is split for those.
struct GroupedShrinkPlan {
  int candidate;  // of kShrinkRanks
  int64_t tiles, rank_blocks;
  Split split;
  int64_t shared_memory;
};

inline GroupedShrinkPlan plan_grouped_shrink(int64_t rows, int64_t depth, int64_t rank, int64_t adapters, bool down, int element_bytes,
                                             const Device& device) {
  const ShrinkPlan plan = plan_shrink(rows, depth, rank, down, element_bytes, device);
  return {plan.candidate, tile_slots(rows, adapters, kGpuTile), plan.rank_blocks, plan.split, plan.shared_memory};
}

// Y += S B_l^T.
struct GroupedExpandPlan {
  int64_t tiles, column_blocks, columns_per_block;
  int64_t shared_memory;
};

inline GroupedExpandPlan plan_grouped_expand(int64_t rows, int64_t columns, int64_t adapters, int element_bytes, const Device& device) {
  const ExpandPlan plan = plan_expand(rows, columns, element_bytes, device);
  const int64_t each = at_least(plan.columns_per_block, kLeastExpandColumns);
  return {tile_slots(rows, adapters, kGpuTile), ceil_div(columns, each), each, plan.shared_memory};
}

// gradient_l = G^T S over the tokens of adapter l, in parts: one adapter may have all tokens, and then fills the device as well.
struct GroupedGradientPlan {
  int candidate;  // of kGradientRanks
  int64_t feature_blocks, rank_blocks;
  int64_t rows_per_part, parts;
  int64_t shared_memory;
};

constexpr int64_t kTokenRing = 4;  // tiles whose tokens a block has in sight

inline GroupedGradientPlan plan_grouped_gradient(int64_t rows, int64_t features, int64_t rank, int64_t adapters, int element_bytes,
                                                 const Device& device) {
  const GradientPlan plan = plan_gradient(rows, features, rank, element_bytes, device);
  return {plan.candidate,
          plan.feature_blocks,
          plan.rank_blocks,
          plan.split.length,
          part_slots(rows, adapters, plan.split.length),
          plan.shared_memory + kTokenRing * kGpuTile * int64_t{sizeof(int32_t)}};
}

}  // namespace peftops::lora
