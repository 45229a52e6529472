// Several projections of one x on CUDA from compute capability 8.0 on: the kernels of sm80.cuh, with one pass over x or over its gradient
// for all projections. 16-bit types.
#pragma once

#include "multi_kernels.h"
#include "sm80_tiles.cuh"

namespace peftops::lora {
namespace sm80 {

// ---- shrink ----------------------------------------------------------------------------------------------------------

// A step is one projection's part of one tile of X: X waits in registers and goes to shared memory once, or, under masks, once for each
// projection, as that one keeps it.
template <class X, bool kDraw, int kProjections, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 ? 4 : 2) multi_shrink(const __grid_constant__ MultiShrinkTask task) {
  using Mine = Share<kChunksPerRow>;
  constexpr int kFactorChunks = kRanks * kChunksPerRow / kThreads;
  X* const x_tiles = reinterpret_cast<X*>(shared_memory);
  X* const factor_tiles = x_tiles + 2 * kPanel;
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_rank = int64_t{blockIdx.z} * kRanks;
  const int64_t begin = int64_t{blockIdx.y} * task.depth_per_split, end = min_of(begin + task.depth_per_split, task.depth);

  Chunk<X> x[kTileChunks], factor[kFactorChunks];
  uint32_t kept[kTileChunks];
  const auto load_x = [&](int64_t depth) {
    const int64_t column = depth + Mine::column();
    fetch<kChunksPerRow>(x, static_cast<const X*>(task.x) + offset_of(first_row, task.x_stride, column), task.x_stride,
                         rows_within(first_row, task.rows, kTile, column < task.depth));
  };
  const auto load = [&](int64_t depth, int j) {
    const auto& projection = task.projections[j];
    const int64_t column = depth + Mine::column();
    const bool off = value_of(projection.scale) == 0.0f;
    fetch<kChunksPerRow>(factor, static_cast<const X*>(projection.factor) + offset_of(first_rank, projection.factor_stride, column),
                         projection.factor_stride, rows_within(first_rank, projection.rank, kRanks, !off && column < task.depth));
    if constexpr (kDraw) {
      const int rows = rows_within(first_row, task.rows, kTile, column < task.depth);
      const uint64_t seed = static_cast<uint64_t>(*projection.seed);
      uint8_t* bits = projection.mask + offset_of(first_row + Mine::line(), task.mask_stride, column / 8);
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i, bits += Mine::kStep * task.mask_stride) {
        const int line = i * Mine::kStep + Mine::line();
        kept[i] = off ? 0 : dropout_byte(seed, first_row + line, column / 8, task.threshold);
        if (line < rows && first_rank == 0) *bits = static_cast<uint8_t>(kept[i]);
      }
    }
  };

  Sums<kRanks / 8> sums[kProjections]{};
  if (begin < end) load_x(begin), load(begin, 0);
  int x_buffer = 0, buffer = 0;
  for (int64_t depth = begin; depth < end; depth += kTile) {
#pragma unroll
    for (int j = 0; j < kProjections; ++j) {
      if (kDraw || j == 0) x_buffer ^= 1;
      X* const x_tile = x_tiles + x_buffer * kPanel;
      X* const f_tile = factor_tiles + buffer * factor_tile_elements(kRanks, false);
      if (kDraw || j == 0) {
#pragma unroll
        for (int i = 0; i < kTileChunks; ++i) {
          Chunk<X> mine = x[i];
          if constexpr (kDraw) keep(mine, kept[i]);
          put<kChunksPerRow>(x_tile, i, mine);
        }
      }
#pragma unroll
      for (int i = 0; i < kFactorChunks; ++i) put<kChunksPerRow>(f_tile, i, factor[i]);
      // One barrier a step: the other buffers were last read before it.
      __syncthreads();
      if (j + 1 < kProjections)
        load(depth, j + 1);
      else if (depth + kTile < end)
        load_x(depth + kTile), load(depth + kTile, 0);
      multiply<false, false>(sums[j], x_tile, 16 * warp(), f_tile, kTile / 16);
      buffer ^= 1;
    }
  }

#pragma unroll
  for (int j = 0; j < kProjections; ++j) {
    const auto& projection = task.projections[j];
    const float scale = value_of(projection.scale);
    float* const out = projection.sums + int64_t{blockIdx.y} * task.split_stride;
    for_each(sums[j], [&](int i, int k, float sum) {
      const int64_t row = first_row + 16 * warp() + i, rank = first_rank + k;
      if (row < task.rows && rank < round_up(projection.rank, 8))
        out[offset_of(row, task.sums_stride, rank)] = scale == 0.0f || rank >= projection.rank ? 0.0f : scale * sum;
    });
  }
}

// ---- expand ----------------------------------------------------------------------------------------------------------

template <class Y, bool kMasked>
__global__ void __launch_bounds__(kThreads, 3) multi_expand(const __grid_constant__ MultiExpandTask task) {
  using Mine = Share<kChunksPerRow>;
  constexpr int kMaskBytes = kTile * kTile / 8;
  Y* const s_tiles = reinterpret_cast<Y*>(shared_memory);
  Y* const factor_tiles = s_tiles + task.count * kPanel;
  float* const delta = reinterpret_cast<float*>(factor_tiles + 2 * kPanel);
  uint8_t* const mask_tiles = reinterpret_cast<uint8_t*>(delta + kTile * kDeltaStride);
  const int64_t first_row = int64_t{blockIdx.x} * kTile, begin = int64_t{blockIdx.y} * task.columns_per_block;
  const int64_t end = min_of(begin + task.columns_per_block, task.columns);
  const auto steps_of = [&](int j) {
    return value_of(task.projections[j].scale) == 0.0f ? 0 : static_cast<int>(ceil_div(task.projections[j].rank, 16));
  };

  // Every projection's sums, once.
#pragma unroll 1
  for (int j = 0; j < task.count; ++j) {
    const auto& projection = task.projections[j];
    const int chunks = 2 * static_cast<int>(ceil_div(projection.rank, 16));
#pragma unroll 1
    for (int index = thread(); index < kTile * chunks; index += kThreads) {
      const int line = index / chunks, column = index % chunks * 8;
      const int64_t row = first_row + line;
      Chunk<float> sum{};
      if (row < task.rows && column < projection.rank) {
        const int64_t offset = offset_of(row, projection.sums_stride, column);
        sum = load_chunk(projection.sums + offset);
#pragma unroll 4  // loads that do not wait for each other
        for (int64_t split = 1; split < projection.splits; ++split) {
          const Chunk<float> next = load_chunk(projection.sums + split * task.rows * projection.sums_stride + offset);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum.value[i] += next.value[i];
        }
        if (projection.sum != nullptr && blockIdx.y == 0) store_chunk(projection.sum + offset, sum);
      }
      put(s_tiles + j * kPanel, line / 8, line % 8, column, chunk_of<Y>(sum.value));
    }
  }

  Chunk<Y> factor[kTileChunks];
  uint32_t kept[kTileChunks];
  const auto load = [&](int64_t first_column, int j) {
    const auto& projection = task.projections[j];
    const int64_t column = first_column + Mine::column();
    const bool exists = column < task.columns && value_of(projection.scale) != 0.0f;
    fetch<kChunksPerRow>(factor, static_cast<const Y*>(projection.factor) + column, projection.factor_stride,
                         rows_within(0, projection.rank, kTile, exists));
    if constexpr (kMasked) {
      const MaskBits mask{const_cast<uint8_t*>(projection.mask), task.mask_stride};
      fetch<kChunksPerRow>(kept, mask, first_row, column, rows_within(first_row, task.rows, kTile, exists));
    }
  };
  const auto chunk_at = [&](const Y* from, int64_t columns) { return task.aligned ? load_chunk(from) : load_chunk(from, columns); };

  load(begin, 0);
  int buffer = 0;
  for (int64_t first_column = begin; first_column < end; first_column += kTile) {
    Sums<kTile / 8> sums{};
#pragma unroll 1
    for (int j = 0; j < task.count; ++j, buffer ^= 1) {
      Y* const factor_tile = factor_tiles + buffer * kPanel;
      uint8_t* const mask_tile = mask_tiles + buffer * kMaskBytes;
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i) {
        put<kChunksPerRow>(factor_tile, i, factor[i]);
        if constexpr (kMasked) mask_tile[(i * Mine::kStep + Mine::line()) * 8 + Mine::column() / 8] = static_cast<uint8_t>(kept[i]);
      }
      // One barrier a step: the other buffers were last read before it.
      __syncthreads();
      if (j + 1 < task.count)
        load(first_column, j + 1);
      else if (first_column + kTile < end)
        load(first_column + kTile, 0);
      if constexpr (!kMasked) {
        multiply<false, true>(sums, s_tiles + j * kPanel, 16 * warp(), factor_tile, steps_of(j));
      } else {
        Sums<kTile / 8> mine{};
        multiply<false, true>(mine, s_tiles + j * kPanel, 16 * warp(), factor_tile, steps_of(j));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint64_t bits =
              *reinterpret_cast<const uint64_t*>(mask_tile + (16 * warp() + lane() / 4 + 8 * half) * 8) >> 2 * (lane() % 4);
#pragma unroll
          for (int tile = 0; tile < kTile / 8; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              sums.value[tile][2 * half + i] += (bits >> (8 * tile + i)) & 1 ? mine.value[tile][2 * half + i] : 0.0f;
        }
      }
    }
    // From fragments to chunks through shared memory. What is read here is next written after the next tile's barriers.
    for_each_pair(sums, [&](int i, int j, float first, float second) {
      *reinterpret_cast<float2*>(delta + (16 * warp() + i) * kDeltaStride + j) = make_float2(first, second);
    });
    __syncthreads();
    const int64_t column = first_column + Mine::column(), columns = task.columns - column;
    const int rows = rows_within(first_row, task.rows, kTile, column < task.columns);
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i) {
      const int line = i * Mine::kStep + Mine::line();
      if (line >= rows) continue;
      const int64_t offset = offset_of(first_row + line, task.columns, column);
      Y* const to = static_cast<Y*>(task.y) + offset;
      const Chunk<Y> y = chunk_at(to, columns);
      float values[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k] = value_of(y, k) + delta[line * kDeltaStride + Mine::column() + k];
#pragma unroll
      for (const void* other : task.others) {
        if (!other) continue;
        const Chunk<Y> more = chunk_at(static_cast<const Y*>(other) + offset, columns);
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] += value_of(more, k);
      }
      if (task.aligned)
        store_chunk(to, chunk_of<Y>(values));
      else
        store_chunk(to, chunk_of<Y>(values), columns);
    }
  }
}

template <class X>
const MultiKernels& multi_kernels() {
  static constexpr MultiKernels table{
      {{multi_shrink<X, false, 2, 16>, multi_shrink<X, false, 2, 64>}, {multi_shrink<X, false, 3, 16>, multi_shrink<X, false, 3, 64>}},
      {{multi_shrink<X, true, 2, 16>, multi_shrink<X, true, 2, 64>}, {multi_shrink<X, true, 3, 16>, multi_shrink<X, true, 3, 64>}},
      multi_expand<X, false>,
      multi_expand<X, true>,
  };
  return table;
}

}  // namespace sm80
}  // namespace peftops::lora
