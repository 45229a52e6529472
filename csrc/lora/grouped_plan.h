// How grouped LoRA is cut up on a GPU: pure host functions of shapes and device. Which adapter a token has is known on the device alone,
// so grids hold what the worst assignment needs, and blocks without work return at once.
#pragma once

#include "plan.h"

namespace peftops::lora {

constexpr int kGroupThreads = 256;
constexpr int64_t kFewTokens = kGroupThreads;      // up to here one block compares every token with every other
constexpr int kListThreads = 1024;
constexpr int64_t kLeastExpandColumns = 256;       // of a block, which first waits for its tile, its tokens and their sums
constexpr int kGroupedFinishElements = 1024;       // of a block of kFinishThreads

// Tokens lie in groups: one for each adapter, then those whose id names none, then those without an adapter.
constexpr int64_t groups_of(int64_t adapters) { return adapters + 2; }

// A tile holds tokens of one group, so each group may leave its last one unfilled.
inline int64_t tile_slots(int64_t rows, int64_t adapters) { return rows / kGpuTile + min_of(groups_of(adapters), rows); }

// Parts of the tokens, `length` long, for the gradients; an adapter without a token has an empty one, which writes zeros.
inline int64_t part_slots(int64_t rows, int64_t adapters, int64_t length) { return rows / length + adapters; }

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
  return {plan.candidate, tile_slots(rows, adapters), plan.rank_blocks, plan.split, plan.shared_memory};
}

// Y += S B_l^T.
struct GroupedExpandPlan {
  int64_t tiles, column_blocks, columns_per_block;
  int64_t shared_memory;
};

inline GroupedExpandPlan plan_grouped_expand(int64_t rows, int64_t columns, int64_t adapters, int element_bytes, const Device& device) {
  const ExpandPlan plan = plan_expand(rows, columns, element_bytes, device);
  const int64_t each = at_least(plan.columns_per_block, kLeastExpandColumns);
  return {tile_slots(rows, adapters), ceil_div(columns, each), each, plan.shared_memory};
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
