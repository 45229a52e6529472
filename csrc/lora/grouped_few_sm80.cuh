// Grouped LoRA of few tokens, as in decoding: most tiles hold one token, and the bytes of the adapters are the work. So tiles have 16 rows,
// and the warps of a block share out a stretch of the contraction or of the columns that is all in flight at once. 16-bit types.
#pragma once

#include "grouped_sm80.cuh"

namespace peftops::lora {
namespace sm80 {

constexpr int kFewTile = static_cast<int>(kFewTileRows), kFewWarps = kThreads / 32;

// A warp has a part of a tile, rows of 64 elements, and each of its lanes one column and every fourth row.
template <int kCount, class T>
PEFTOPS_DEVICE void put_lines(T* tile, const Chunk<T> (&chunks)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) put(tile, i / 2, i % 2 * 4 + lane() / 8, lane() % 8 * 8, chunks[i]);
}

// Of the rows of a matrix that exist; `from` is in this lane's column of the first.
template <int kCount, class T>
PEFTOPS_DEVICE void fetch_lines(Chunk<T> (&chunks)[kCount], const T* from, int64_t stride, int rows) {
  from += (lane() / 8) * stride;
#pragma unroll
  for (int i = 0; i < kCount; ++i, from += 4 * stride) chunks[i] = 4 * i + lane() / 8 < rows ? load_chunk(from) : Chunk<T>{};
}

PEFTOPS_DEVICE void fetch_few_tokens(int32_t (&tokens)[kFewTile / 4], const int32_t* order, int count) {
#pragma unroll
  for (int i = 0; i < kFewTile / 4; ++i) {
    const int line = 4 * i + lane() / 8;
    tokens[i] = line < count ? order[line] : -1;
  }
}

// The task of grouped_shrink, with A_l as [rank, depth].
template <class X, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 ? 5 : 3) grouped_shrink_few(const __grid_constant__ GroupedShrinkTask task) {
  constexpr int kSumStride = kRanks + 4;  // float32 between rows
  static_assert(kFewWarps * kFewTile * kSumStride * 4 <= kFewWarps * (kFewTile + kRanks) * kTile * 2);
  const Tile tile = task.tiles[blockIdx.x];
  if (tile.count == 0) return;
  X* const x_tile = reinterpret_cast<X*>(shared_memory) + warp() * (kFewTile + kRanks) * kTile;
  X* const f_tile = x_tile + kFewTile * kTile;
  const int64_t first_rank = int64_t{blockIdx.z} * kRanks, ranks = ranks_of(task.adapters, tile.group);
  const int64_t begin = int64_t{blockIdx.y} * task.depth_per_split, end = min_of(begin + task.depth_per_split, task.depth);
  const bool off = first_rank >= ranks;
  const float scale = off ? 0.0f : task.adapters.scales[tile.group];
  const X* const adapter = static_cast<const X*>(task.factors) + (off ? 0 : offset_of(tile.group, task.adapter_stride, 0)) +
                           offset_of(first_rank, task.factor_stride, 0);
  int32_t tokens[kFewTile / 4];
  fetch_few_tokens(tokens, task.order + tile.first, tile.count);

  Chunk<X> x[kFewTile / 4], factor[kRanks / 4];
  const auto load = [&](int64_t depth) {
    const int64_t column = depth + warp() * kTile + lane() % 8 * 8;
    gather(x, static_cast<const X*>(task.x) + column, task.x_stride, tokens, column < task.depth);
    fetch_lines(factor, adapter + column, task.factor_stride, rows_within(first_rank, ranks, kRanks, column < task.depth));
  };

  Sums<kRanks / 8> sums{};
  const int64_t start = off ? end : begin;
  if (start < end) load(start);
  for (int64_t depth = start; depth < end; depth += kFewDepth) {
    put_lines(x_tile, x);
    put_lines(f_tile, factor);
    __syncthreads();
    if (depth + kFewDepth < end) load(depth + kFewDepth);
    multiply<false, false>(sums, x_tile, 0, f_tile, kTile / 16);
    __syncthreads();
  }

  // The warps' sums, added in their order.
  float* const parts = reinterpret_cast<float*>(shared_memory);
  for_each_pair(sums, [&](int i, int j, float first, float second) {
    *reinterpret_cast<float2*>(parts + (warp() * kFewTile + i) * kSumStride + j) = make_float2(first, second);
  });
  __syncthreads();
  float* const out = task.sums + int64_t{blockIdx.y} * task.rows * task.sums_stride;
  const float beyond = names_none(task.adapters, tile.group) ? float_of(0x7fc00000u) : 0.0f;
#pragma unroll 1
  for (int index = thread(); index < tile.count * kRanks; index += kThreads) {
    const int line = index / kRanks, j = index % kRanks;
    const int64_t rank = first_rank + j;
    if (rank >= task.sums_stride) continue;
    float sum = parts[line * kSumStride + j];
#pragma unroll
    for (int other = 1; other < kFewWarps; ++other) sum += parts[(other * kFewTile + line) * kSumStride + j];
    out[offset_of(task.order[tile.first + line], task.sums_stride, rank)] = rank < ranks ? scale * sum : beyond;
  }
}

// The task of grouped_expand, with B_l as [columns, rank]; a block has kFewColumns columns, a warp 64 of them, and kRanks ranks at a time.
template <class Y, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 ? 4 : 2) grouped_expand_few(const __grid_constant__ GroupedExpandTask task) {
  constexpr int kRankChunks = kRanks / 8, kStep = 32 / kRankChunks, kCount = kTile / kStep;
  static_assert(kFewTile * kDeltaStride * 4 <= kPanel * 2);
  const Tile tile = task.tiles[blockIdx.x];
  if (tile.count == 0) return;
  Y* const f_tile = reinterpret_cast<Y*>(shared_memory) + warp() * kPanel;
  Y* const s_tile = reinterpret_cast<Y*>(shared_memory) + kFewWarps * kPanel;
  float* const delta = reinterpret_cast<float*>(f_tile);  // after the products
  const int64_t first_column = int64_t{blockIdx.y} * kFewColumns + warp() * kTile, column = first_column + lane() % 8 * 8;
  const int64_t ranks = ranks_of(task.adapters, tile.group);
  const bool exists = column < task.columns;
  const int line = lane() / kRankChunks, rank_column = lane() % kRankChunks * 8;
  const Y* const adapter = static_cast<const Y*>(task.factors) + (ranks ? offset_of(tile.group, task.adapter_stride, 0) : 0) +
                           offset_of(first_column + line, task.factor_stride, rank_column);

  Chunk<Y> factor[kCount];
  const auto load = [&](int64_t first_rank) {
    const int rows = rows_within(first_column, task.columns, kTile, first_rank + rank_column < ranks);
    const Y* from = adapter + first_rank;
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += kStep * task.factor_stride)
      factor[i] = line + i * kStep < rows ? load_chunk(from) : Chunk<Y>{};
    keep_ranks(factor, ranks - first_rank - rank_column);
  };
  if (ranks > 0) load(0);
  int32_t tokens[kFewTile / 4];
  fetch_few_tokens(tokens, task.order + tile.first, tile.count);
  Y* const y_rows = static_cast<Y*>(task.y);
  write_sums(task, tile);
  if (names_none(task.adapters, tile.group)) write_nan(y_rows + column, task.columns, tokens, task.columns - column);
  if (ranks == 0) return;
  Chunk<Y> y[kFewTile / 4];
  if (task.y_aligned) gather(y, y_rows + column, task.columns, tokens, exists);

  Sums<kTile / 8> sums{};
  for (int64_t first_rank = 0; first_rank < ranks; first_rank += kRanks) {
    const int left = static_cast<int>(min_of(ranks - first_rank, kRanks));
    for (int index = thread(); index < kFewTile * kRankChunks; index += kThreads) {
      const int row = index / kRankChunks, rank = index % kRankChunks * 8;
      Chunk<float> sum{};
      if (row < tile.count && rank < left) sum = sum_of_splits(task, task.order[tile.first + row], first_rank + rank);
      put(s_tile, row / 8, row % 8, rank, chunk_of<Y>(sum.value));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) put(f_tile, (line + i * kStep) / 8, (line + i * kStep) % 8, rank_column, factor[i]);
    __syncthreads();
    if (first_rank + kRanks < ranks) load(first_rank + kRanks);
    multiply<false, false>(sums, s_tile, 0, f_tile, (left + 15) / 16);
    __syncthreads();
  }
  for_each_pair(sums, [&](int i, int j, float first, float second) {
    *reinterpret_cast<float2*>(delta + i * kDeltaStride + j) = make_float2(first, second);
  });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kFewTile / 4; ++i)
    if (exists && tokens[i] >= 0)
      add_chunk(y_rows + offset_of(tokens[i], task.columns, column), y[i], delta + (4 * i + lane() / 8) * kDeltaStride + lane() % 8 * 8,
                task.y_aligned, task.columns - column);
}

template <class X, class F, int kRanks>
constexpr Kernel<GroupedShrinkTask> few_shrink() {
  if constexpr (sizeof(typename ElementOf<X, F>::type) == 2)
    return grouped_shrink_few<X, kRanks>;
  else
    return nullptr;
}

template <class X, class F, int kRanks>
constexpr Kernel<GroupedExpandTask> few_expand() {
  if constexpr (sizeof(typename ElementOf<X, F>::type) == 2)
    return grouped_expand_few<X, kRanks>;
  else
    return nullptr;
}

template <class X, class F>
const GroupedKernels& grouped_kernels() {
  static constexpr GroupedKernels table{
      sizeof(typename ElementOf<X, F>::type),
      {grouped_shrink<X, F, false, 16>, grouped_shrink<X, F, false, 64>, widest_grouped_shrink<X, F, false>()},
      {grouped_shrink<X, F, true, 16>, grouped_shrink<X, F, true, 64>, widest_grouped_shrink<X, F, true>()},
      grouped_expand<X, F, false>,
      grouped_expand<X, F, true>,
      {grouped_gradient<X, F, 16>, grouped_gradient<X, F, 64>},
      grouped_finish<F>,
      {few_shrink<X, F, 16>(), few_shrink<X, F, 64>()},
      {few_expand<X, F, 16>(), few_expand<X, F, 64>()},
  };
  return table;
}

}  // namespace sm80
}  // namespace peftops::lora
