// LoRA on CUDA from compute capability 8.0 on: mma.sync for 16-bit types, and for float32 factors beside a bfloat16 x, as sums of bfloat16
// numbers; plain float32 (never TF32) else.
//
// Every kernel moves chunks of eight columns from global memory into registers, one tile ahead of the products, drops what the mask drops,
// and puts them into swizzled tiles in shared memory; each warp multiplies its 16 rows of one tile by the columns of the other. Sums are
// float32 and their order depends on shapes and the plan alone; there are no atomics.
#pragma once

#include "sm80_tiles.cuh"

namespace peftops::lora {
namespace sm80 {

// ---- shrink ----------------------------------------------------------------------------------------------------------

// Blocks per multiprocessor that the registers are to allow.
template <class M>
constexpr int blocks_of(int ranks) {
  return sizeof(typename M::type) == 2 ? (ranks == 16 ? 5 : ranks == 64 && M::kTerms == 1 ? 4 : 2) : (ranks == 16 ? 4 : 2);
}

template <class X, class F, bool kDown, bool kDraw, int kRanks>
__global__ void __launch_bounds__(kThreads, blocks_of<Multiplied<X, F>>(kRanks)) shrink(const __grid_constant__ ShrinkTask task) {
  using E = typename Multiplied<X, F>::type;
  constexpr int kTerms = Multiplied<X, F>::kTerms, kFactorTile = factor_tile_elements(kRanks, kDown);
  using XShare = Share<kChunksPerRow>;
  constexpr int kFactorRow = kDown ? kRanks / 8 : kChunksPerRow;  // chunks in a row of the factor's tile
  using FactorShare = Share<kFactorRow>;
  E* const x_tiles = reinterpret_cast<E*>(shared_memory);
  E* const factor_tiles = x_tiles + 2 * kPanel;
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_rank = int64_t{blockIdx.z} * kRanks;
  const int64_t begin = int64_t{blockIdx.y} * task.depth_per_split, end = min_of(begin + task.depth_per_split, task.depth);
  const float scale = value_of(task.scale);
  const bool off = scale == 0.0f;
  const uint64_t seed = kDraw ? static_cast<uint64_t>(*task.seed) : 0;

  Chunk<X> x[kTileChunks];
  Chunk<F> factor[kRanks * kChunksPerRow / kThreads];
  uint32_t kept[kTileChunks];
  const auto load = [&](int64_t depth) {
    const int64_t column = depth + XShare::column();
    const int rows = rows_within(first_row, task.rows, kTile, column < task.depth);
    fetch<kChunksPerRow>(x, static_cast<const X*>(task.x) + offset_of(first_row, task.x_stride, column), task.x_stride, rows);
    const int64_t row = kDown ? depth : first_rank, factor_column = (kDown ? first_rank : depth) + FactorShare::column();
    fetch<kFactorRow>(
        factor, static_cast<const F*>(task.factor) + offset_of(row, task.factor_stride, factor_column), task.factor_stride,
        rows_within(row, kDown ? task.depth : task.rank, kDown ? kTile : kRanks, factor_column < (kDown ? task.rank : task.depth)));
    if constexpr (kDraw) {
      uint8_t* bits = task.mask.data + offset_of(first_row + XShare::line(), task.mask.stride, column / 8);
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i, bits += XShare::kStep * task.mask.stride) {
        const int line = i * XShare::kStep + XShare::line();
        kept[i] = off ? 0 : dropout_byte(seed, first_row + line, column / 8, task.threshold);
        if (line < rows && first_rank == 0) *bits = static_cast<uint8_t>(kept[i]);
      }
    }
  };

  Sums<kRanks / 8> sums{};
  const int64_t start = kDraw || !off ? begin : end;
  if (start < end) load(start);
  int buffer = 0;
  for (int64_t depth = start; depth < end; depth += kTile, buffer ^= 1) {
    E* const x_tile = x_tiles + buffer * kPanel;
    E* const f_tile = factor_tiles + buffer * kTerms * kFactorTile;
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i) {
      if constexpr (kDraw) keep(x[i], kept[i]);
      put<kChunksPerRow>(x_tile, i, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kRanks * kChunksPerRow / kThreads; ++i) put_terms<kFactorRow, kTerms>(f_tile, kFactorTile, i, factor[i]);
    // One barrier a tile: the other buffer was last read before it.
    __syncthreads();
    if (depth + kTile < end) load(depth + kTile);
    multiply_terms<false, kDown, kTerms>(sums, x_tile, 16 * warp(), f_tile, kFactorTile);
  }

  float* const out = task.sums + int64_t{blockIdx.y} * task.rows * task.sums_stride;
  for_each(sums, [&](int i, int j, float sum) {
    const int64_t row = first_row + 16 * warp() + i, rank = first_rank + j;
    // Beyond the rank the sum is zero unless x has an infinity, which times zero is NaN.
    if (row < task.rows && rank < task.sums_stride)
      out[offset_of(row, task.sums_stride, rank)] = off || rank >= task.rank ? 0.0f : scale * sum;
  });
}

// A chunk of the sum over splits that lie `stride` apart, in order.
PEFTOPS_DEVICE Chunk<float> load_sum(const float* from, int64_t splits, int64_t stride) {
  Chunk<float> sum = load_chunk(from);
#pragma unroll 4  // loads that do not wait for each other
  for (int64_t split = 1; split < splits; ++split) {
    from += stride;
    const Chunk<float> next = load_chunk(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.value[j] += next.value[j];
  }
  return sum;
}

// The first two terms of float32 numbers: all but 2^-17 of each.
struct Pair {
  Chunk<bfloat16> first, second;
};

PEFTOPS_DEVICE Pair pair_of(const Chunk<float>& chunk) {
  Chunk<bfloat16> terms[2];
  split(terms, chunk);
  return {terms[0], terms[1]};
}

// ---- expand ----------------------------------------------------------------------------------------------------------

template <class Y, class F, bool kDown, bool kMasked>
__global__ void __launch_bounds__(kThreads, sizeof(typename Multiplied<Y, F>::type) == 2 && Multiplied<Y, F>::kTerms == 1 ? 4 : 2)
    expand(const __grid_constant__ ExpandTask task) {
  using E = typename Multiplied<Y, F>::type;
  using Mine = Share<kChunksPerRow>;
  // Of S1 + S2 and F1 + F2 the products S1 F1, S1 F2 and S2 F1.
  constexpr int kProducts = Multiplied<Y, F>::kTerms;
  E* const s_tile = reinterpret_cast<E*>(shared_memory);
  E* const factor_tile = s_tile + kProducts * kPanel;
  float* const delta = reinterpret_cast<float*>(factor_tile + kProducts * kPanel);
  const int64_t first_row = int64_t{blockIdx.x} * kTile, begin = int64_t{blockIdx.y} * task.columns_per_block;
  const int64_t end = min_of(begin + task.columns_per_block, task.columns);
  const bool writes = task.sum != nullptr && blockIdx.y == 0;
  const auto rank_steps = [&](int64_t first_rank) { return static_cast<int>(ceil_div(min_of(task.rank - first_rank, kTile), 16)); };

  // The sums of the splits for ranks from `first_rank` on, in as many chunks a row as the products read.
  const auto load_sums = [&](int64_t first_rank, bool write) {
    const int chunks = 2 * rank_steps(first_rank);
#pragma unroll 1
    for (int index = thread(); index < kTile * chunks; index += kThreads) {
      const int line = index / chunks, column = index % chunks * 8;
      const int64_t row = first_row + line, rank = first_rank + column;
      Chunk<float> sum{};
      if (row < task.rows && rank < task.rank) {
        sum = load_sum(task.sums + offset_of(row, task.sums_stride, rank), task.splits, task.rows * task.sums_stride);
        if (write) store_chunk(task.sum + offset_of(row, task.sum_stride, rank), sum, task.sum_stride - rank);
      }
      if constexpr (kProducts == 1) {
        put(s_tile, line / 8, line % 8, column, chunk_of<E>(sum.value));
      } else {
        const Pair pair = pair_of(sum);
        put(s_tile, line / 8, line % 8, column, pair.first);
        put(s_tile + kPanel, line / 8, line % 8, column, finite(pair.first));
        put(s_tile + 2 * kPanel, line / 8, line % 8, column, pair.second);
      }
    }
  };

  if (value_of(task.scale) == 0.0f) {
    for (int64_t rank = 0; writes && rank < task.rank; rank += kTile) load_sums(rank, true);
    return;
  }
  for (int64_t first_column = begin; first_column < end; first_column += kTile) {
    const int64_t column = first_column + Mine::column();
    const int rows = rows_within(first_row, task.rows, kTile, column < task.columns);
    Y* const lines = static_cast<Y*>(task.y) + offset_of(first_row, task.columns, column);
    Chunk<Y> y[kTileChunks];
    uint32_t kept[kTileChunks];
    if (task.y_aligned) fetch<kChunksPerRow>(y, lines, task.columns, rows);
    if constexpr (kMasked) fetch<kChunksPerRow>(kept, task.mask, first_row, column, rows);

    Sums<kTile / 8> sums{};
    for (int64_t first_rank = 0; first_rank < task.rank; first_rank += kTile) {
      __syncthreads();
      if (task.rank > kTile || first_column == begin) load_sums(first_rank, writes && first_column == begin);
      const int64_t row = kDown ? first_rank : first_column, factor_column = (kDown ? first_column : first_rank) + Mine::column();
      Chunk<F> factor[kTileChunks];
      fetch<kChunksPerRow>(factor, static_cast<const F*>(task.factor) + offset_of(row, task.factor_stride, factor_column),
                           task.factor_stride,
                           rows_within(row, kDown ? task.rank : task.columns, kTile, factor_column < (kDown ? task.columns : task.rank)));
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i) {
        if constexpr (kProducts == 1) {
          put<kChunksPerRow>(factor_tile, i, factor[i]);
        } else {
          const Pair pair = pair_of(factor[i]);
          put<kChunksPerRow>(factor_tile, i, pair.first);
          put<kChunksPerRow>(factor_tile + kPanel, i, pair.second);
          put<kChunksPerRow>(factor_tile + 2 * kPanel, i, finite(pair.first));
        }
      }
      __syncthreads();
#pragma unroll 1  // the largest last
      for (int product = kProducts - 1; product >= 0; --product)
        multiply<false, kDown>(sums, s_tile + product * kPanel, 16 * warp(), factor_tile + product * kPanel, rank_steps(first_rank));
    }
    // From fragments to chunks through shared memory. What is read here is next written after the next tile's barriers.
    for_each_pair(sums, [&](int i, int j, float first, float second) {
      *reinterpret_cast<float2*>(delta + (16 * warp() + i) * kDeltaStride + j) = make_float2(first, second);
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i) {
      const int line = i * Mine::kStep + Mine::line();
      if (line >= rows) continue;
      Y* const to = lines + line * task.columns;
      if (!task.y_aligned) y[i] = load_chunk(to, task.columns - column);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float added = delta[line * kDeltaStride + Mine::column() + j];
        values[j] = value_of(y[i], j) + (!kMasked || (kept[i] >> j) & 1 ? added : 0.0f);
      }
      if (task.y_aligned)
        store_chunk(to, chunk_of<Y>(values));
      else
        store_chunk(to, chunk_of<Y>(values), task.columns - column);
    }
  }
}

// ---- gradient --------------------------------------------------------------------------------------------------------

template <class G, class F, bool kMasked, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 ? 4 : 2) gradient(const __grid_constant__ GradientTask task) {
  using E = typename Multiplied<G, F>::type;
  constexpr int kTerms = Multiplied<G, F>::kTerms, kSumsTile = factor_tile_elements(kRanks, true);
  constexpr int kHalves = sizeof(E) == 2 ? 2 : 1;  // 16 features of a warp
  constexpr int kFeatures = kHalves * kTile;       // of a block
  constexpr int kRowChunks = kFeatures / 8, kRankChunks = kRanks / 8;
  using GShare = Share<kRowChunks>;
  using SShare = Share<kRankChunks>;
  E* const g_tiles = reinterpret_cast<E*>(shared_memory);
  E* const s_tiles = g_tiles + 2 * kHalves * kPanel;
  const int64_t first_feature = int64_t{blockIdx.x} * kFeatures, first_rank = int64_t{blockIdx.z} * kRanks;
  const int64_t begin = int64_t{blockIdx.y} * task.rows_per_split, end = min_of(begin + task.rows_per_split, task.rows);
  const int64_t feature = first_feature + GShare::column(), rank = first_rank + SShare::column();
  const bool off = value_of(task.scale) == 0.0f;

  Chunk<G> g[GShare::kCount];
  Chunk<float> s[SShare::kCount];
  uint32_t kept[GShare::kCount];
  const auto load = [&](int64_t row) {
    const int rows = rows_within(row, end, kTile, feature < task.features);
    fetch<kRowChunks>(g, static_cast<const G*>(task.g) + offset_of(row, task.g_stride, feature), task.g_stride, rows);
    if constexpr (kMasked) fetch<kRowChunks>(kept, task.mask, row, feature, rows);
    fetch<kRankChunks>(s, task.s + offset_of(row, task.s_stride, rank), task.s_stride, rows_within(row, end, kTile, rank < task.rank));
  };

  Sums<kRankChunks> sums[kHalves]{};
  const int64_t start = off ? end : begin;
  if (start < end) load(start);
  int buffer = 0;
  for (int64_t row = start; row < end; row += kTile, buffer ^= 1) {
    E* const g_tile = g_tiles + buffer * kHalves * kPanel;
    E* const s_tile = s_tiles + buffer * kTerms * kSumsTile;
#pragma unroll
    for (int i = 0; i < GShare::kCount; ++i) {
      if constexpr (kMasked) keep(g[i], kept[i]);
      put<kRowChunks>(g_tile, i, g[i]);
    }
#pragma unroll
    for (int i = 0; i < SShare::kCount; ++i) {
      if constexpr (kTerms == 1)
        put<kRankChunks>(s_tile, i, chunk_of<E>(s[i].value));
      else
        put_terms<kRankChunks, kTerms>(s_tile, kSumsTile, i, s[i]);
    }
    __syncthreads();
    if (row + kTile < end) load(row + kTile);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      multiply_terms<true, true, kTerms>(sums[half], g_tile, 16 * (kHalves * warp() + half), s_tile, kSumsTile);
  }

#pragma unroll
  for (int half = 0; half < kHalves; ++half)
    for_each(sums[half], [&](int i, int j, float sum) {
      const int64_t row = first_feature + 16 * (kHalves * warp() + half) + i, column = first_rank + j;
      if (row >= task.features || column >= task.rank) return;
      const float value = off ? 0.0f : sum;
      const int64_t offset = row * task.feature_stride + column * task.rank_stride;
      if (task.partials)
        task.partials[int64_t{blockIdx.y} * task.features * task.rank + offset] = value;
      else if constexpr (sizeof(F) == 4)
        static_cast<float*>(task.gradient)[offset] = value;
      else
        static_cast<F*>(task.gradient)[offset].bits = static_cast<uint16_t>(pack(F{}, value, 0.0f));
    });
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ FinishTask task) {
  const auto& result = task.results[blockIdx.y];
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + thread();
  if (i >= result.count) return;
  float sum = result.partials[i];
#pragma unroll 8  // loads that do not wait for each other
  for (int64_t split = 1; split < result.splits; ++split) sum += result.partials[split * result.count + i];
  if constexpr (sizeof(T) == 4)
    static_cast<float*>(result.out)[i] = sum;
  else
    static_cast<T*>(result.out)[i].bits = static_cast<uint16_t>(pack(T{}, sum, 0.0f));
}

template <class E, class F>
__global__ void __launch_bounds__(kThreads) operand(const __grid_constant__ OperandTask task) {
  constexpr int kProducts = Multiplied<E, F>::kTerms;
  const int64_t first_row = int64_t{blockIdx.x} * kTile, stride = kProducts * task.sums_stride;
  const int chunks = static_cast<int>(task.sums_stride / 8), count = static_cast<int>(min_of(task.rows - first_row, kTile)) * chunks;
#pragma unroll 1
  for (int index = thread(); index < count; index += kThreads) {
    const int64_t row = first_row + index / chunks, rank = index % chunks * 8;
    const Chunk<float> sum = load_sum(task.sums + offset_of(row, task.sums_stride, rank), task.splits, task.rows * task.sums_stride);
    if (task.sum) store_chunk(task.sum + offset_of(row, task.sum_stride, rank), sum, task.sum_stride - rank);
    E* const to = static_cast<E*>(task.operand) + offset_of(row, stride, rank);
    if constexpr (kProducts == 1) {
      store_chunk(to, chunk_of<E>(sum.value));
    } else {
      const Pair pair = pair_of(sum);
      store_chunk(to, pair.first);
      store_chunk(to + task.sums_stride, finite(pair.first));
      store_chunk(to + 2 * task.sums_stride, pair.second);
    }
  }
}

// A template, so that the one file that names it has it.
template <class F>
__global__ void __launch_bounds__(kThreads) factor_operand(const __grid_constant__ FactorTask task) {
  using Mine = Share<kChunksPerRow>;
  const int64_t column = int64_t{blockIdx.x} * kTile + Mine::column();
  if (column >= task.whole_columns) return;
  for (int64_t line = int64_t{blockIdx.y} * Mine::kStep + Mine::line(); line < task.whole_lines; line += int64_t{gridDim.y} * Mine::kStep) {
    const F* const from = task.factor + offset_of(line, task.stride, column);
    const Pair pair = pair_of(line < task.lines ? load_chunk(from, task.columns - column) : Chunk<F>{});
    bfloat16* const to = static_cast<bfloat16*>(task.operand) + offset_of(line, task.operand_stride, column);
    store_chunk(to, pair.first);
    store_chunk(to + task.apart, pair.second);
    store_chunk(to + 2 * task.apart, finite(pair.first));
  }
}

// A template, so that the one file that names it has it.
template <class Keep>
__global__ void __launch_bounds__(kThreads) dropout_mask(const __grid_constant__ DropoutMaskTask task) {
  const uint64_t seed = static_cast<uint64_t>(*task.seed);
  const int64_t blocks = ceil_div(task.columns, 8), count = task.rows * blocks, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + thread(); i < count; i += step) {
    const int64_t row = i / blocks, block = i % blocks;
    const uint32_t bits = dropout_byte(seed, row, block, task.threshold);
    Keep* const to = task.keep + offset_of(row, task.columns, 8 * block);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (8 * block + j < task.columns) to[j] = (bits >> j) & 1;
  }
}

template <class X, class F, bool kDown, bool kDraw>
constexpr Kernel<ShrinkTask> widest_shrink() {
  if constexpr (sizeof(typename Multiplied<X, F>::type) == 2 && Multiplied<X, F>::kTerms == 1)
    return shrink<X, F, kDown, kDraw, 128>;
  else
    return nullptr;
}

template <class X, class F>
constexpr Kernel<OperandTask> operand_of() {
  if constexpr (sizeof(typename Multiplied<X, F>::type) == 2)
    return operand<X, F>;
  else
    return nullptr;
}

template <class X, class F>
const Kernels& kernels() {
  static constexpr Kernels table{
      sizeof(typename Multiplied<X, F>::type),
      Multiplied<X, F>::kTerms,
      {shrink<X, F, false, false, 16>, shrink<X, F, false, false, 64>, widest_shrink<X, F, false, false>()},
      {shrink<X, F, false, true, 16>, shrink<X, F, false, true, 64>, widest_shrink<X, F, false, true>()},
      {shrink<X, F, true, false, 16>, shrink<X, F, true, false, 64>, widest_shrink<X, F, true, false>()},
      expand<X, F, false, false>,
      expand<X, F, true, false>,
      expand<X, F, true, true>,
      {gradient<X, F, false, 16>, gradient<X, F, false, 64>},
      {gradient<X, F, true, 16>, gradient<X, F, true, 64>},
      finish<F>,
      operand_of<X, F>(),
  };
  return table;
}

}  // namespace sm80
}  // namespace peftops::lora
