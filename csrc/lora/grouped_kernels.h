// The CUDA kernels of grouped LoRA behind plain function pointers. grouped_cuda.cu plans and launches them; grouped_sm80.cuh is their code.
//
// The first kernels put the tokens in groups of one adapter each and list tiles of them; the rest works on these, gathering rows of x and
// scattering rows of y. Matrices are in whole chunks as in cuda_kernels.h.
#pragma once

#include "cuda_kernels.h"
#include "grouped_plan.h"

namespace peftops::lora {

// int32 or int64 numbers.
struct Integers {
  const void* data;
  bool wide;
};

// Up to kGpuTile tokens (kFewTileRows where they are few) of one group: order[first .. first + count). An unused slot has count 0.
struct alignas(16) Tile {
  int32_t group, first, count, unused;
};

// Tokens of one adapter, one of `parts` pieces of them; the slot is that of its list. An unused slot has adapter -1.
struct alignas(16) Part {
  int32_t adapter, first, count, parts;
};

// Where an adapter's parts begin in the list of parts.
struct Range {
  int32_t first, count;
};

// order = the tokens by group, each group in ascending order; starts[g] = where group g begins, starts[groups] = rows. Grid: groups.
struct GroupTask {
  Integers ids;
  int64_t rows, adapters, rows_per_thread;
  int32_t *order, *starts;
};

// The tiles of all groups and, where parts is not null, the parts of all adapters. Grid: one block.
struct ListTask {
  const int32_t* starts;
  int64_t adapters, groups_per_thread;
  Tile* tiles;
  int64_t tile_slots;
  Part* parts;
  int64_t part_slots;
  int32_t rows_per_part;
  Range* ranges;  // of each adapter
};

// order and tiles for up to kFewTokens tokens. Grid: one block.
struct GroupFewTask {
  Integers ids;
  int64_t rows, adapters;
  int32_t* order;
  Tile* tiles;
  int64_t tile_slots;
  int32_t tile_rows;
};

// Where the tokens are, and what each adapter has. An adapter of scale 0 has no ranks.
struct Adapters {
  int64_t count, rank;
  const float* scales;
  Integers ranks;  // data null: all of them
};

// sums[split][token][rank] = scale_l X A_l^T over the split's part of the contraction; zero beyond the ranks of l and without an adapter,
// NaN where the id names none. A_l lies as [rank, depth], or `down` as [depth, rank]. Grid: tiles, splits, rank blocks.
struct GroupedShrinkTask {
  const Tile* tiles;
  const int32_t* order;
  Adapters adapters;
  const void* x;
  int64_t rows, depth, x_stride;
  const void* factors;
  int64_t adapter_stride, factor_stride;
  int64_t depth_per_split;
  float* sums;
  int64_t sums_stride;
};

// Y += S B_l^T, S being the sum of its splits in order; NaN where the id names no adapter. B_l lies as [columns, rank], or `down` as
// [rank, columns]. Grid: tiles, column blocks.
struct GroupedExpandTask {
  const Tile* tiles;
  const int32_t* order;
  Adapters adapters;
  void* y;
  int64_t rows, columns;  // Y is contiguous
  const float* sums;
  int64_t splits, sums_stride;
  float* sum;  // [rows][sum_stride], written where it is not null
  int64_t sum_stride;
  const void* factors;
  int64_t adapter_stride, factor_stride;
  int64_t columns_per_block;
  bool y_aligned;
};

// gradient_l[feature, rank] = G^T S over the tokens of l, whole where l has one part, else per part into partials [slot][features * rank].
// Grid: part slots, feature blocks, rank blocks.
struct GroupedGradientTask {
  const Part* parts;
  const int32_t* order;
  Adapters adapters;
  const void* g;
  int64_t rows, features, g_stride;
  const float* s;
  int64_t s_stride;
  int64_t rows_per_part;
  void* gradient;  // of adapter l from l * features * rank on
  float* partials;
  int64_t feature_stride, rank_stride;
};

// gradient_l = sum of its parts in order, for adapters that have more than one. Grid: adapters, blocks of elements, one after another.
struct GroupedFinishTask {
  const Range* ranges;
  int64_t adapters, count;  // elements of each
  const float* partials;
  void* gradient;
};

struct GroupedKernels {
  int element_bytes;  // of what is multiplied
  Kernel<GroupedShrinkTask> shrink[3], shrink_down[3];
  Kernel<GroupedExpandTask> expand, expand_down;
  Kernel<GroupedGradientTask> gradient[2];
  Kernel<GroupedFinishTask> finish;
  Kernel<GroupedShrinkTask> shrink_few[2];  // by kFewRanks; null where refuse_few says why
  Kernel<GroupedExpandTask> expand_few[2];
};

Kernel<GroupTask> group_kernel();
Kernel<GroupFewTask> group_few_kernel();
Kernel<ListTask> list_kernel();

const GroupedKernels& grouped_kernels_float32();
const GroupedKernels& grouped_kernels_bfloat16();
const GroupedKernels& grouped_kernels_float16();
const GroupedKernels& grouped_kernels_bfloat16_float32();
const GroupedKernels& grouped_kernels_float16_float32();

}  // namespace peftops::lora
