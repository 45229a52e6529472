// The segmented GEMM from compute capability 8.0 on: mma.sync.m16n8k16, tiles on their way by cp.async.
//
// A block of four warps makes 128 x 128 of D, a warp 64 x 64. All segments are one sequence of tiles of 32 along the contraction, four of
// which are in shared memory. Sums are float32; their order depends on the segments alone.
#pragma once

#include "gemm.h"
#include "sm80_tiles.cuh"

namespace peftops::lora {
namespace sm80 {

constexpr int kGemmWarpTile = 64;
constexpr int kOperandElements = kGemmTile * kGemmDepth;
constexpr int kGemmChunks = kOperandElements / 8 / kThreads;  // of an operand's tile, a thread's
static_assert(kGemmDepth == kNarrowTileColumns && kGemmWarpTile == kTile);

// An operand's tile: [128][32] with the contraction along the rows, or `down` [32][128], as panels of 64 columns.
template <bool kDown, class E>
PEFTOPS_DEVICE E* operand_at(E* tile, int block, int row, int column) {
  if constexpr (kDown)
    return tile + column / kTile * (kGemmDepth * kTile) + block * 8 * kTile + TileLayout<sizeof(E)>{}(row, column % kTile);
  else
    return tile + block * 8 * kGemmDepth + NarrowTileLayout{}(row, column);
}

// D's tile: [128][128], as panels of 64 columns.
template <class E>
PEFTOPS_DEVICE E* result_at(E* tile, int row, int column) {
  return tile + column / kTile * (kGemmTile * kTile) + row / 8 * (8 * kTile) + TileLayout<sizeof(E)>{}(row % 8, column % kTile);
}

// Sends this thread's chunks of an operand's tile on their way. Of the matrix, `rows` rows exist from `first` on, and `columns` columns
// from `column` on.
template <bool kDown, class E>
PEFTOPS_DEVICE void send(E* tile, const void* matrix, int64_t stride, int64_t first, int64_t rows, int64_t column, int64_t columns) {
  constexpr int kRowChunks = (kDown ? kGemmTile : kGemmDepth) / 8, kStep = kThreads / kRowChunks;
  const int me = made_here(thread()), line = me / kRowChunks, unit = me % kRowChunks * 8;
  const E* from = static_cast<const E*>(matrix) + offset_of(first + line, stride, column + unit);
  const int exist = unit < columns ? static_cast<int>(min_of(rows - line, kGemmTile)) : 0;
  E* const to = operand_at<kDown>(tile, line / 8, line % 8, unit);
#pragma unroll
  for (int i = 0; i < kGemmChunks; ++i, from += kStep * stride)
    cp_async_16(operand_at<kDown>(to, i * kStep / 8, 0, 0), from, i * kStep < exist);
}

// One warp's sums: four times 16 rows by 64 columns.
using GemmSums = Sums<kGemmWarpTile / 8>[kGemmWarpTile / 16];

// sums += X W^T over one tile of the contraction, from row and column of the block's tile on.
template <bool kDown, class E>
PEFTOPS_DEVICE void multiply_tile(GemmSums& sums, const E* x, int row, const E* w, int column) {
#pragma unroll
  for (int k = 0; k < kGemmDepth; k += 16) {
    uint32_t columns[kGemmWarpTile / 16][4];
#pragma unroll
    for (int j = 0; j < kGemmWarpTile / 16; ++j) {
      if constexpr (kDown)
        ldmatrix_x4_trans(columns[j], operand_at<true>(w, k / 8 + lane() / 8 % 2, lane() % 8, column + 16 * j + lane() / 16 * 8));
      else
        ldmatrix_x4(columns[j], operand_at<false>(w, column / 8 + 2 * j + lane() / 16, lane() % 8, k + lane() / 8 % 2 * 8));
    }
#pragma unroll
    for (int i = 0; i < kGemmWarpTile / 16; ++i) {
      uint32_t rows[4];
      ldmatrix_x4(rows, operand_at<false>(x, row / 8 + 2 * i + lane() / 8 % 2, lane() % 8, k + lane() / 16 * 8));
#pragma unroll
      for (int j = 0; j < kGemmWarpTile / 16; ++j) {
        mma(E{}, sums[i].value[2 * j], rows, {columns[j][0], columns[j][1]});
        mma(E{}, sums[i].value[2 * j + 1], rows, {columns[j][2], columns[j][3]});
      }
    }
  }
}

// Zero where the mask drops; a dropped NaN is gone. What lies outside of D gets the bits of its last row and column: nobody reads it.
PEFTOPS_DEVICE void drop(GemmSums& sums, const MaskBits& mask, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) {
  const int lane_row = made_here(lane() / 4), last_row = static_cast<int>(min_of(rows - 1 - first_row, kGemmWarpTile - 1));
  const int last = static_cast<int>(min_of(ceil_div(columns, 8) - 1 - first_column / 8, kGemmWarpTile / 8 - 1));
  const uint8_t* const bits = mask.data + offset_of(first_row, mask.stride, first_column / 8);
#pragma unroll
  for (int i = 0; i < kGemmWarpTile / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row + 16 * i + 8 * half;
      const uint8_t* const line = bits + (row < last_row ? row : last_row) * mask.stride;
#pragma unroll
      for (int j = 0; j < kGemmWarpTile / 8; ++j) {
        const uint32_t kept = uint32_t{line[j < last ? j : last]} >> (2 * (lane() % 4));
        float (&pair)[4] = sums[i].value[j];
        pair[2 * half] = kept & 1 ? pair[2 * half] : 0.0f;
        pair[2 * half + 1] = kept & 2 ? pair[2 * half + 1] : 0.0f;
      }
    }
}

// value[column] as float, or `otherwise`.
template <class T>
PEFTOPS_DEVICE float value_at(const T* values, int64_t column, int64_t columns, float otherwise) {
  if (values == nullptr || column >= columns) return otherwise;
  if constexpr (sizeof(T) == 4)
    return values[column];
  else
    return unpack(values[column]);
}

template <class E, bool kDown>
__global__ void __launch_bounds__(kThreads, 2) gemm(const __grid_constant__ GemmTask task) {
  E* const tiles = reinterpret_cast<E*>(shared_memory);
  const auto row_blocks = static_cast<uint32_t>(ceil_div(task.rows, kGemmTile));
  const auto column_blocks = static_cast<uint32_t>(ceil_div(task.columns, kGemmTile));
  const GemmBlock block = gemm_block(blockIdx.x, row_blocks, column_blocks);
  const int64_t first_row = int64_t{block.row} * kGemmTile, first_column = int64_t{block.column} * kGemmTile;
  const int warp_row = warp() % 2 * kGemmWarpTile, warp_column = warp() / 2 * kGemmWarpTile;
  const bool off = value_of(task.scale) == 0.0f;

  SegmentTile coming = first_tile(task, 0, off);
  int under_way = 0;    // tiles
  uint32_t closes = 0;  // bit of a stage: its tile is the last of segment 0
  const auto send_next = [&](int stage) {
    if (coming.segment < task.count) {
      const Segment& segment = task.segments[coming.segment];
      E* const x = tiles + stage * 2 * kOperandElements;
      const int64_t depth = segment.depth - coming.depth;
      send<false>(x, segment.x, segment.x_stride, first_row, task.rows - first_row, coming.depth, depth);
      if constexpr (kDown)
        send<true>(x + kOperandElements, segment.w, segment.w_stride, coming.depth, depth, first_column, task.columns - first_column);
      else
        send<false>(x + kOperandElements, segment.w, segment.w_stride, first_column, task.columns - first_column, coming.depth, depth);
      const bool first = coming.segment == 0;
      coming = next_tile(task, coming, kGemmDepth, off);
      closes = (closes & ~(1u << stage)) | static_cast<uint32_t>(first && coming.segment != 0) << stage;
      ++under_way;
    }
    cp_async_commit();  // a group of nothing, too, so that the wait below always means the same tile
  };
#pragma unroll 1
  for (int stage = 0; stage < kGemmStages - 1; ++stage) send_next(stage);

  GemmSums sums{};
#pragma unroll 1
  for (int stage = 0; under_way > 0; --under_way, stage = (stage + 1) % kGemmStages) {
    cp_async_wait<kGemmStages - 2>();
    // One barrier a tile: what is sent now goes where all have read before it.
    __syncthreads();
    send_next((stage + kGemmStages - 1) % kGemmStages);
    const E* const x = tiles + stage * 2 * kOperandElements;
    multiply_tile<kDown>(sums, x, warp_row, x + kOperandElements, warp_column);
    if (task.mask.data && (closes >> stage) & 1)
      drop(sums, task.mask, first_row + warp_row, task.rows, first_column + warp_column, task.columns);
  }

  // From fragments to chunks through shared memory.
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kGemmWarpTile / 8; ++j) {
    const int pair = warp_column + 8 * j + 2 * (lane() % 4);
    float bias[2], scale[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bias[e] = value_at(static_cast<const E*>(task.bias), first_column + pair + e, task.columns, 0.0f);
      scale[e] = value_at(task.column_scale, first_column + pair + e, task.columns, 1.0f);
    }
#pragma unroll
    for (int i = 0; i < kGemmWarpTile / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const sum = sums[i].value[j] + 2 * half;
        *reinterpret_cast<uint32_t*>(result_at(tiles, warp_row + 16 * i + 8 * half + lane() / 4, pair)) =
            pack(E{}, fmaf(scale[0], sum[0], bias[0]), fmaf(scale[1], sum[1], bias[1]));
      }
  }
  __syncthreads();
  using Mine = Share<kGemmTile / 8>;
  const int64_t column = first_column + Mine::column();
  const bool whole = column + 8 <= task.columns && task.d_stride % 8 == 0 && reinterpret_cast<uintptr_t>(task.d) % 16 == 0;
  const int rows = rows_within(first_row, task.rows, kGemmTile, column < task.columns);
  E* to = static_cast<E*>(task.d) + offset_of(first_row + Mine::line(), task.d_stride, column);
#pragma unroll 1
  for (int line = Mine::line(); line < rows; line += Mine::kStep, to += Mine::kStep * task.d_stride) {
    const Chunk<E> chunk = load_chunk(static_cast<const E*>(result_at(tiles, line, Mine::column())));
    if (whole)
      store_chunk(to, chunk);
    else
      store_chunk(to, chunk, task.columns - column);
  }
}

template <class E>
const GemmKernels& gemm_kernels() {
  static constexpr GemmKernels table{gemm<E, false>, gemm<E, true>};
  return table;
}

}  // namespace sm80
}  // namespace peftops::lora
