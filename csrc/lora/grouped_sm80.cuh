// Grouped LoRA on CUDA from compute capability 8.0 on: the kernels of sm80.cuh over tiles of tokens that share an adapter.
//
// Rows of x, of S and of y lie where their tokens are: a thread keeps the tokens of its lines. Rows that a tile lacks are not loaded, and
// warps without a row do not multiply, so for one token of an adapter the adapter's bytes are the work.
#pragma once

#include "grouped_kernels.h"
#include "sm80_tiles.cuh"

namespace peftops::lora {
namespace sm80 {

PEFTOPS_DEVICE int64_t value_of(const Integers& integers, int64_t i) {
  return integers.wide ? static_cast<const int64_t*>(integers.data)[i] : static_cast<const int32_t*>(integers.data)[i];
}

PEFTOPS_DEVICE int64_t ranks_of(const Adapters& adapters, int64_t group) {
  if (group >= adapters.count || adapters.scales[group] == 0.0f) return 0;
  if (!adapters.ranks.data) return adapters.rank;
  const int64_t rank = value_of(adapters.ranks, group);
  return rank < 0 ? 0 : min_of(rank, adapters.rank);
}

PEFTOPS_DEVICE bool names_none(const Adapters& adapters, int64_t group) { return group == adapters.count; }

// The tokens of this thread's lines of a tile, -1 where there is none.
template <int kRowChunks, int kCount>
PEFTOPS_DEVICE void fetch_tokens(int32_t (&tokens)[kCount], const int32_t* order, int count) {
  using Mine = Share<kRowChunks>;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int line = i * Mine::kStep + Mine::line();
    tokens[i] = line < count ? order[line] : -1;
  }
}

// This thread's chunks of the tokens' rows, `from` being in this thread's column.
template <int kCount, class T>
PEFTOPS_DEVICE void gather(Chunk<T> (&chunks)[kCount], const T* from, int64_t stride, const int32_t (&tokens)[kCount], bool column) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) chunks[i] = column && tokens[i] >= 0 ? load_chunk(from + tokens[i] * stride) : Chunk<T>{};
}

// Zero for the ranks of these chunks that do not exist, of which there may be anything in memory.
template <int kCount, class T>
PEFTOPS_DEVICE void keep_ranks(Chunk<T> (&chunks)[kCount], int64_t ranks) {
  if (ranks >= 8) return;
#pragma unroll
  for (Chunk<T>& chunk : chunks) keep(chunk, ranks > 0 ? (1u << ranks) - 1 : 0);
}

// ---- shrink ----------------------------------------------------------------------------------------------------------

// Blocks per multiprocessor that the registers are to allow.
template <class E>
constexpr int grouped_blocks_of(int ranks) {
  return sizeof(E) == 2 ? (ranks == 128 ? 2 : 4) : (ranks == 16 ? 4 : 2);
}

template <class X, class F, bool kDown, int kRanks>
__global__ void __launch_bounds__(kThreads, grouped_blocks_of<typename ElementOf<X, F>::type>(kRanks))
    grouped_shrink(const __grid_constant__ GroupedShrinkTask task) {
  using E = typename ElementOf<X, F>::type;
  constexpr int kFactorRow = kDown ? kRanks / 8 : kChunksPerRow;  // chunks in a row of the factor's tile
  using XShare = Share<kChunksPerRow>;
  using FactorShare = Share<kFactorRow>;
  const Tile tile = task.tiles[blockIdx.x];
  if (tile.count == 0) return;
  E* const x_tiles = reinterpret_cast<E*>(shared_memory);
  E* const factor_tiles = x_tiles + 2 * kPanel;
  const int64_t first_rank = int64_t{blockIdx.z} * kRanks, ranks = ranks_of(task.adapters, tile.group);
  const int64_t begin = int64_t{blockIdx.y} * task.depth_per_split, end = min_of(begin + task.depth_per_split, task.depth);
  const bool off = first_rank >= ranks;
  const float scale = off ? 0.0f : task.adapters.scales[tile.group];
  const F* const adapter = static_cast<const F*>(task.factors) + (off ? 0 : tile.group * task.adapter_stride);
  int32_t tokens[kTileChunks];
  fetch_tokens<kChunksPerRow>(tokens, task.order + tile.first, tile.count);

  Chunk<X> x[kTileChunks];
  Chunk<F> factor[kRanks * kChunksPerRow / kThreads];
  const auto load = [&](int64_t depth) {
    const int64_t column = depth + XShare::column();
    gather(x, static_cast<const X*>(task.x) + column, task.x_stride, tokens, column < task.depth);
    const int64_t row = kDown ? depth : first_rank, factor_column = (kDown ? first_rank : depth) + FactorShare::column();
    fetch<kFactorRow>(factor, adapter + offset_of(row, task.factor_stride, factor_column), task.factor_stride,
                      rows_within(row, kDown ? task.depth : ranks, kDown ? kTile : kRanks, factor_column < (kDown ? ranks : task.depth)));
  };

  Sums<kRanks / 8> sums{};
  const int64_t start = off ? end : begin;
  if (start < end) load(start);
  int buffer = 0;
  for (int64_t depth = start; depth < end; depth += kTile, buffer ^= 1) {
    E* const x_tile = x_tiles + buffer * kPanel;
    E* const f_tile = factor_tiles + buffer * factor_tile_elements(kRanks, kDown);
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i) put<kChunksPerRow>(x_tile, i, x[i]);
#pragma unroll
    for (int i = 0; i < kRanks * kChunksPerRow / kThreads; ++i) put<kFactorRow>(f_tile, i, factor[i]);
    // One barrier a tile: the other buffer was last read before it.
    __syncthreads();
    if (depth + kTile < end) load(depth + kTile);
    if (16 * warp() < tile.count) multiply<false, kDown>(sums, x_tile, 16 * warp(), f_tile, kTile / 16);
  }

  float* const out = task.sums + int64_t{blockIdx.y} * task.rows * task.sums_stride;
  const float beyond = names_none(task.adapters, tile.group) ? float_of(0x7fc00000u) : 0.0f;
  for_each(sums, [&](int i, int j, float sum) {
    const int line = 16 * warp() + i;
    const int64_t rank = first_rank + j;
    if (line < tile.count && rank < task.sums_stride)
      out[offset_of(task.order[tile.first + line], task.sums_stride, rank)] = rank < ranks ? scale * sum : beyond;
  });
}

// ---- expand ----------------------------------------------------------------------------------------------------------

// Eight ranks of a token's S.
PEFTOPS_DEVICE Chunk<float> sum_of_splits(const GroupedExpandTask& task, int64_t token, int64_t rank) {
  const float* from = task.sums + offset_of(token, task.sums_stride, rank);
  Chunk<float> sum = load_chunk(from);
#pragma unroll 4  // loads that do not wait for each other
  for (int64_t split = 1; split < task.splits; ++split) {
    from += task.rows * task.sums_stride;
    const Chunk<float> next = load_chunk(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.value[j] += next.value[j];
  }
  return sum;
}

// S of a tile's tokens, where somebody wants it: one block of each tile writes it.
PEFTOPS_DEVICE void write_sums(const GroupedExpandTask& task, const Tile& tile) {
  if (task.sum == nullptr || blockIdx.y != 0) return;
  const int chunks = static_cast<int>(ceil_div(task.adapters.rank, 8));
#pragma unroll 1
  for (int index = thread(); index < tile.count * chunks; index += kThreads) {
    const int64_t token = task.order[tile.first + index / chunks], rank = index % chunks * 8;
    store_chunk(task.sum + offset_of(token, task.sum_stride, rank), sum_of_splits(task, token, rank), task.sum_stride - rank);
  }
}

// NaN into the chunks of these tokens, `to` being in this thread's column of Y.
template <int kCount, class Y>
PEFTOPS_DEVICE void write_nan(Y* to, int64_t stride, const int32_t (&tokens)[kCount], int64_t columns) {
  float nan[8];
#pragma unroll
  for (float& value : nan) value = float_of(0x7fc00000u);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (tokens[i] >= 0) store_chunk(to + tokens[i] * stride, chunk_of<Y>(nan), columns);
}

// Y += delta for a chunk, which is in `y` already where Y is aligned.
template <class Y>
PEFTOPS_DEVICE void add_chunk(Y* to, Chunk<Y> y, const float* delta, bool aligned, int64_t columns) {
  if (!aligned) y = load_chunk(to, columns);
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = value_of(y, j) + delta[j];
  if (aligned)
    store_chunk(to, chunk_of<Y>(values));
  else
    store_chunk(to, chunk_of<Y>(values), columns);
}

template <class Y, class F, bool kDown>
__global__ void __launch_bounds__(kThreads, sizeof(typename ElementOf<Y, F>::type) == 2 ? 4 : 2)
    grouped_expand(const __grid_constant__ GroupedExpandTask task) {
  using E = typename ElementOf<Y, F>::type;
  using Mine = Share<kChunksPerRow>;
  const Tile tile = task.tiles[blockIdx.x];
  if (tile.count == 0) return;
  E* const s_tile = reinterpret_cast<E*>(shared_memory);
  E* const factor_tile = s_tile + kPanel;
  float* const delta = reinterpret_cast<float*>(factor_tile + kPanel);
  const int64_t begin = int64_t{blockIdx.y} * task.columns_per_block, end = min_of(begin + task.columns_per_block, task.columns);
  const int64_t ranks = ranks_of(task.adapters, tile.group);
  const F* const adapter = static_cast<const F*>(task.factors) + (ranks ? tile.group * task.adapter_stride : 0);
  const auto rank_steps = [&](int64_t first_rank) { return static_cast<int>(ceil_div(min_of(ranks - first_rank, kTile), 16)); };

  // Into the tile, for ranks from `first_rank` on, in as many chunks a row as the products read.
  const auto load_sums = [&](int64_t first_rank) {
    const int chunks = 2 * rank_steps(first_rank);
#pragma unroll 1
    for (int index = thread(); index < kTile * chunks; index += kThreads) {
      const int line = index / chunks, column = index % chunks * 8;
      Chunk<float> sum{};
      if (line < tile.count && first_rank + column < ranks) sum = sum_of_splits(task, task.order[tile.first + line], first_rank + column);
      put(s_tile, line / 8, line % 8, column, chunk_of<E>(sum.value));
    }
  };

  int32_t tokens[kTileChunks];
  fetch_tokens<kChunksPerRow>(tokens, task.order + tile.first, tile.count);
  Y* const y_rows = static_cast<Y*>(task.y);
  write_sums(task, tile);
  if (names_none(task.adapters, tile.group))
    for (int64_t column = begin + Mine::column(); column < end; column += kTile)
      write_nan(y_rows + column, task.columns, tokens, task.columns - column);
  if (ranks == 0) return;

  for (int64_t first_column = begin; first_column < end; first_column += kTile) {
    const int64_t column = first_column + Mine::column();
    const bool exists = column < task.columns;
    Chunk<Y> y[kTileChunks];
    if (task.y_aligned) gather(y, y_rows + column, task.columns, tokens, exists);

    Sums<kTile / 8> sums{};
    for (int64_t first_rank = 0; first_rank < ranks; first_rank += kTile) {
      __syncthreads();
      if (ranks > kTile || first_column == begin) load_sums(first_rank);
      const int64_t row = kDown ? first_rank : first_column, factor_column = (kDown ? first_column : first_rank) + Mine::column();
      Chunk<F> factor[kTileChunks];
      fetch<kChunksPerRow>(factor, adapter + offset_of(row, task.factor_stride, factor_column), task.factor_stride,
                           rows_within(row, kDown ? ranks : task.columns, kTile, factor_column < (kDown ? task.columns : ranks)));
      if constexpr (!kDown) keep_ranks(factor, ranks - factor_column);
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i) put<kChunksPerRow>(factor_tile, i, factor[i]);
      __syncthreads();
      if (16 * warp() < tile.count) multiply<false, kDown>(sums, s_tile, 16 * warp(), factor_tile, rank_steps(first_rank));
    }
    // From fragments to chunks through shared memory. What is read here is next written after the next tile's barriers.
    for_each_pair(sums, [&](int i, int j, float first, float second) {
      *reinterpret_cast<float2*>(delta + (16 * warp() + i) * kDeltaStride + j) = make_float2(first, second);
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i)
      if (exists && tokens[i] >= 0)
        add_chunk(y_rows + offset_of(tokens[i], task.columns, column), y[i],
                  delta + (i * Mine::kStep + Mine::line()) * kDeltaStride + Mine::column(), task.y_aligned, task.columns - column);
  }
}

// ---- gradient --------------------------------------------------------------------------------------------------------

template <class G, class F, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 ? 4 : 2) grouped_gradient(const __grid_constant__ GroupedGradientTask task) {
  using E = typename ElementOf<G, F>::type;
  constexpr int kHalves = sizeof(E) == 2 ? 2 : 1;  // 16 features of a warp
  constexpr int kFeatures = kHalves * kTile;       // of a block
  constexpr int kRowChunks = kFeatures / 8, kRankChunks = kRanks / 8;
  using GShare = Share<kRowChunks>;
  using SShare = Share<kRankChunks>;
  const Part part = task.parts[blockIdx.x];
  if (part.adapter < 0) return;
  E* const g_tiles = reinterpret_cast<E*>(shared_memory);
  E* const s_tiles = g_tiles + 2 * kHalves * kPanel;
  auto* const ring = reinterpret_cast<int32_t*>(s_tiles + 2 * factor_tile_elements(kRanks, true));  // the tokens of kTokenRing tiles
  const int64_t first_feature = int64_t{blockIdx.y} * kFeatures, first_rank = int64_t{blockIdx.z} * kRanks;
  const int64_t feature = first_feature + GShare::column(), rank = first_rank + SShare::column();
  const int64_t ranks = ranks_of(task.adapters, part.adapter);
  const int count = first_rank < ranks ? part.count : 0, tiles = (count + kTile - 1) / kTile;
  const bool features = feature < task.features, has_rank = rank < ranks;

  // Tokens come three tiles ahead: two on their way to the ring and from it, one for the rows themselves.
  const auto token_of = [&](int tile) {
    const int line = tile * kTile + thread();
    return thread() < kTile && line < count ? task.order[part.first + line] : -1;
  };
  const auto keep_token = [&](int tile, int32_t token) {
    if (thread() < kTile) ring[tile % kTokenRing * kTile + thread()] = token;
  };
  Chunk<G> g[GShare::kCount];
  Chunk<float> s[SShare::kCount];
  const auto load = [&](int tile) {
    int32_t tokens[GShare::kCount], s_tokens[SShare::kCount];
    fetch_tokens<kRowChunks>(tokens, ring + tile % kTokenRing * kTile, kTile);
    fetch_tokens<kRankChunks>(s_tokens, ring + tile % kTokenRing * kTile, kTile);
    gather(g, static_cast<const G*>(task.g) + feature, task.g_stride, tokens, features);
    gather(s, task.s + rank, task.s_stride, s_tokens, has_rank);
  };

  Sums<kRankChunks> sums[kHalves]{};
  keep_token(0, token_of(0));
  keep_token(1, token_of(1));
  int32_t ahead = token_of(2);
  __syncthreads();
  if (tiles > 0) load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    E* const g_tile = g_tiles + tile % 2 * kHalves * kPanel;
    E* const s_tile = s_tiles + tile % 2 * factor_tile_elements(kRanks, true);
#pragma unroll
    for (int i = 0; i < GShare::kCount; ++i) put<kRowChunks>(g_tile, i, g[i]);
#pragma unroll
    for (int i = 0; i < SShare::kCount; ++i) put<kRankChunks>(s_tile, i, chunk_of<E>(s[i].value));
    keep_token(tile + 2, ahead);
    __syncthreads();
    ahead = token_of(tile + 3);
    if (tile + 1 < tiles) load(tile + 1);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) multiply<true, true>(sums[half], g_tile, 16 * (kHalves * warp() + half), s_tile, kTile / 16);
  }

#pragma unroll
  for (int half = 0; half < kHalves; ++half)
    for_each(sums[half], [&](int i, int j, float sum) {
      const int64_t row = first_feature + 16 * (kHalves * warp() + half) + i, column = first_rank + j;
      if (row >= task.features || column >= task.adapters.rank) return;
      // Beyond the ranks the sum is zero unless G has an infinity, which times zero is NaN.
      const float value = column < ranks ? sum : 0.0f;
      const int64_t size = task.features * task.adapters.rank, offset = row * task.feature_stride + column * task.rank_stride;
      if (part.parts > 1)
        task.partials[int64_t{blockIdx.x} * size + offset] = value;
      else if constexpr (sizeof(F) == 4)
        static_cast<float*>(task.gradient)[part.adapter * size + offset] = value;
      else
        static_cast<F*>(task.gradient)[part.adapter * size + offset].bits = static_cast<uint16_t>(pack(F{}, value, 0.0f));
    });
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads) grouped_finish(const __grid_constant__ GroupedFinishTask task) {
  const Range range = task.ranges[blockIdx.x];
  if (range.count < 2) return;
  const float* const partials = task.partials + range.first * task.count;
  const int64_t step = int64_t{gridDim.y} * kFinishThreads;
  for (int64_t i = int64_t{blockIdx.y} * kFinishThreads + thread(); i < task.count; i += step) {
    float sum = partials[i];
#pragma unroll 8  // loads that do not wait for each other
    for (int part = 1; part < range.count; ++part) sum += partials[part * task.count + i];
    const int64_t to = int64_t{blockIdx.x} * task.count + i;
    if constexpr (sizeof(T) == 4)
      static_cast<float*>(task.gradient)[to] = sum;
    else
      static_cast<T*>(task.gradient)[to].bits = static_cast<uint16_t>(pack(T{}, sum, 0.0f));
  }
}

template <class X, class F, bool kDown>
constexpr Kernel<GroupedShrinkTask> widest_grouped_shrink() {
  if constexpr (sizeof(typename ElementOf<X, F>::type) == 2)
    return grouped_shrink<X, F, kDown, 128>;
  else
    return nullptr;
}

}  // namespace sm80
}  // namespace peftops::lora
