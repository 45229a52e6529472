// Which projections of one x share a pass on a GPU: pure host functions of shapes and device.
#pragma once

#include "plan.h"

namespace peftops::lora {

constexpr int kSharingProjections = 3;           // q, k and v; gate and up
constexpr int64_t kMostSharedExpandRanks = 64;   // of a projection whose sums stay in shared memory

// Up-projections that share a pass over Y. `reason` is null where they do.
inline const char* refuse_multi(int64_t projections, int element_bytes, const Device& device) {
  if (device.sm < 80) return "mma.sync of bfloat16 needs compute capability 8.0";
  if (element_bytes > 2) return "float32 sums of several projections do not fit the registers";
  if (projections < 2) return "one projection has nothing to share";
  return nullptr;
}

// How many projections the next shared pass takes, of `left`: three, or two so that none is left alone.
inline int64_t sharing(int64_t left) { return left == 2 || left == 4 ? 2 : min_of(left, kSharingProjections); }

// S_j = c_j keep_j(X) A_j^T for all j.
struct MultiShrinkPlan {
  int candidate;  // of kShrinkRanks
  int64_t row_blocks, rank_blocks;
  Split split;
  int64_t shared_memory;
};

inline MultiShrinkPlan plan_multi_shrink(int64_t rows, int64_t depth, int64_t most_ranks, const Device& device) {
  MultiShrinkPlan plan{};
  plan.candidate = most_ranks > kShrinkRanks[0];
  const int ranks = kShrinkRanks[plan.candidate];
  plan.row_blocks = ceil_div(rows, kGpuTile);
  plan.rank_blocks = at_least(ceil_div(most_ranks, ranks), 1);
  plan.split = plan_split(depth, plan.row_blocks * plan.rank_blocks, 2, device);
  plan.shared_memory = shrink_memory(ranks, false, 2, 1);
  return plan;
}

// Y += sum_j keep_j(S_j A_j).
inline int64_t multi_expand_memory(int64_t projections) {
  return (projections + 2) * kGpuTile * kGpuTile * 2 + int64_t{kGpuTile} * kDeltaStride * 4 + 2 * kGpuTile * kGpuTile / 8;
}

inline const char* refuse_multi_expand(int64_t projections, int64_t most_ranks, int element_bytes, const Device& device) {
  if (const char* reason = refuse_multi(projections, element_bytes, device)) return reason;
  if (most_ranks > kMostSharedExpandRanks) return "the sums of a projection do not fit a tile";
  if (multi_expand_memory(projections) > device.shared_memory) return "the tiles do not fit the shared memory";
  return nullptr;
}

}  // namespace peftops::lora
