// What the sm_80 kernels of this room are made of: chunks of eight columns on their way from global memory, swizzled tiles in shared
// memory, and the products of tiles by warps.
#pragma once

#include "../common/index.h"
#include "../common/layout.h"
#include "../common/philox.h"
#include "../common/ptx.cuh"
#include "cuda_kernels.h"

namespace peftops::lora {
namespace sm80 {

constexpr int kTile = kGpuTile;  // rows and columns of a tile
static_assert(kTile == kTileColumns);
constexpr int kPanel = kTile * kTile;
constexpr int kChunksPerRow = kTile / 8;
constexpr int kTileChunks = kTile * kChunksPerRow / kThreads;  // chunks per thread

PEFTOPS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
PEFTOPS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
PEFTOPS_DEVICE int warp() { return static_cast<int>(threadIdx.x) / 32; }

// ---- chunks ----------------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Chunk {
  uint32_t pair[4];
};
template <>
struct alignas(16) Chunk<float> {
  float value[8];
};

template <class T>
PEFTOPS_DEVICE Chunk<T> load_chunk(const T* from) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof chunk / 16); ++i)
    reinterpret_cast<uint4*>(&chunk)[i] = reinterpret_cast<const uint4*>(from)[i];
  return chunk;
}

template <class T>
PEFTOPS_DEVICE void store_chunk(T* to, const Chunk<T>& chunk) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof chunk / 16); ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&chunk)[i];
}

// The first `columns` elements alone, one by one; zero beyond.
template <class T>
PEFTOPS_DEVICE Chunk<T> load_chunk(const T* from, int64_t columns) {
  Chunk<T> chunk{};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= columns) break;
    if constexpr (sizeof(T) == 4)
      chunk.value[j] = from[j];
    else
      chunk.pair[j / 2] |= static_cast<uint32_t>(from[j].bits) << (16 * (j % 2));
  }
  return chunk;
}

template <class T>
PEFTOPS_DEVICE void store_chunk(T* to, const Chunk<T>& chunk, int64_t columns) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= columns) break;
    if constexpr (sizeof(T) == 4)
      to[j] = chunk.value[j];
    else
      to[j].bits = static_cast<uint16_t>(chunk.pair[j / 2] >> (16 * (j % 2)));
  }
}

template <class T>
PEFTOPS_DEVICE float value_of(const Chunk<T>& chunk, int j) {
  if constexpr (sizeof(T) == 4)
    return chunk.value[j];
  else
    return unpack(T{static_cast<uint16_t>(chunk.pair[j / 2] >> (16 * (j % 2)))});
}

template <class T>
PEFTOPS_DEVICE Chunk<T> chunk_of(const float (&values)[8]) {
  Chunk<T> chunk;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    if constexpr (sizeof(T) == 4)
      chunk.value[j] = values[j], chunk.value[j + 1] = values[j + 1];
    else
      chunk.pair[j / 2] = pack(T{}, values[j], values[j + 1]);
  }
  return chunk;
}

// Zero where the bit is zero: a dropped NaN is gone.
template <class T>
PEFTOPS_DEVICE void keep(Chunk<T>& chunk, uint32_t bits) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    if constexpr (sizeof(T) == 4) {
      chunk.value[j] = (bits >> j) & 1 ? chunk.value[j] : 0.0f;
      chunk.value[j + 1] = (bits >> (j + 1)) & 1 ? chunk.value[j + 1] : 0.0f;
    } else {
      chunk.pair[j / 2] &= ((bits >> j) & 1 ? 0x0000ffffu : 0u) | ((bits >> (j + 1)) & 1 ? 0xffff0000u : 0u);
    }
  }
}

// ---- tiles and products ----------------------------------------------------------------------------------------------

// What is multiplied for x in X and factors in F.
template <class X, class F>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<bfloat16, bfloat16> {
  using type = bfloat16;
};
template <>
struct ElementOf<float16, float16> {
  using type = float16;
};

// What is multiplied for x in X and factors in F by the kernels of one adapter. A float32 factor beside a bfloat16 x is the sum of
// kTerms bfloat16 numbers, so that no product is of float32.
template <class X, class F>
struct Multiplied {
  using type = typename ElementOf<X, F>::type;
  static constexpr int kTerms = 1;
};
template <>
struct Multiplied<bfloat16, float> {
  using type = bfloat16;
  static constexpr int kTerms = 3;
};

// The nearest bfloat16, as float, or for numbers beyond the largest the one nearer to zero: nothing becomes infinite.
PEFTOPS_DEVICE float leading(float value) {
  const uint32_t rounded = bits_of(value) + 0x8000u;
  return float_of(((rounded & 0x7f800000u) == 0x7f800000u ? bits_of(value) : rounded) & 0xffff0000u);
}

// What is left of a number without its leading part; three such parts are all of it. Nothing is left of infinity, a NaN of a NaN.
PEFTOPS_DEVICE float rest(float value) { return (bits_of(value) & 0x7fffffffu) == 0x7f800000u ? 0.0f : value - leading(value); }

template <int kTerms>
PEFTOPS_DEVICE void split(Chunk<bfloat16> (&terms)[kTerms], const Chunk<float>& chunk) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    float low = chunk.value[j], high = chunk.value[j + 1];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      terms[term].pair[j / 2] = bits_of(leading(low)) >> 16 | bits_of(leading(high));
      low = rest(low), high = rest(high);
    }
  }
}

// Zero for each of two bfloat16 that is not finite. Infinity counts in the product with a number's first term alone: with a later one,
// which may be zero, it would give NaN.
PEFTOPS_DEVICE uint32_t finite(uint32_t pair) {
  const uint32_t special = ((pair & 0x7f807f80u) + 0x00800080u) >> 15 & 0x00010001u;  // one where the exponent is all ones
  return pair & ~(special * 0xffffu);
}

PEFTOPS_DEVICE Chunk<bfloat16> finite(Chunk<bfloat16> chunk) {
#pragma unroll
  for (uint32_t& pair : chunk.pair) pair = finite(pair);
  return chunk;
}

// Row 8 * block + row of a tile. Tiles wider than 64 columns are panels of 64 by 64, one after another. The block is apart, because a
// constant one then costs no register.
template <class E>
PEFTOPS_DEVICE E* at(E* tile, int block, int row, int column) {
  return tile + column / kTile * kPanel + block * 8 * kTile + TileLayout<sizeof(E)>{}(row, column % kTile);
}

template <class E, class T>
PEFTOPS_DEVICE void put(E* tile, int block, int row, int column, const Chunk<T>& chunk) {
  if constexpr (sizeof(E) == 2) {
    static_assert(sizeof(T) == 2);
    *reinterpret_cast<uint4*>(at(tile, block, row, column)) = *reinterpret_cast<const uint4*>(&chunk);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *reinterpret_cast<float4*>(at(tile, block, row, column + j)) =
          make_float4(value_of(chunk, j), value_of(chunk, j + 1), value_of(chunk, j + 2), value_of(chunk, j + 3));
  }
}

// How the block's threads share a tile with `kRowChunks` chunks a row: each thread has one column and every kStep-th row.
template <int kRowChunks>
struct Share {
  static constexpr int kStep = kThreads / kRowChunks;
  static constexpr int kCount = kTile / kStep;  // chunks of a thread, where the tile has 64 rows

  PEFTOPS_MEMBER static int line() { return thread() / kRowChunks; }
  PEFTOPS_MEMBER static int column() { return thread() % kRowChunks * 8; }
};

// This thread's chunks of a tile of which `rows` rows exist, the first at `from`, in this thread's column. One running pointer, and 32-bit
// comparisons: addresses that the compiler keeps per chunk would spill.
template <int kRowChunks, int kCount, class T>
PEFTOPS_DEVICE void fetch(Chunk<T> (&chunks)[kCount], const T* from, int64_t stride, int rows) {
  using Mine = Share<kRowChunks>;
  const T* line = from + Mine::line() * stride;
#pragma unroll
  for (int i = 0; i < kCount; ++i, line += Mine::kStep * stride)
    chunks[i] = i * Mine::kStep + Mine::line() < rows ? load_chunk(line) : Chunk<T>{};
}

// The same for keep-bits.
template <int kRowChunks, int kCount>
PEFTOPS_DEVICE void fetch(uint32_t (&bits)[kCount], const MaskBits& mask, int64_t row, int64_t column, int rows) {
  using Mine = Share<kRowChunks>;
  const uint8_t* line = mask.data + offset_of(row + Mine::line(), mask.stride, column / 8);
#pragma unroll
  for (int i = 0; i < kCount; ++i, line += Mine::kStep * mask.stride) bits[i] = i * Mine::kStep + Mine::line() < rows ? *line : 0;
}

// This thread's i-th chunk into the tile.
template <int kRowChunks, class E, class T>
PEFTOPS_DEVICE void put(E* tile, int i, const Chunk<T>& chunk) {
  using Mine = Share<kRowChunks>;
  put(tile, i * Mine::kStep / 8 + Mine::line() / 8, Mine::line() % 8, Mine::column(), chunk);
}

// The same for each of the chunk's terms, into tiles that lie `apart` elements apart.
template <int kRowChunks, int kTerms, class E, class T>
PEFTOPS_DEVICE void put_terms(E* tile, int apart, int i, const Chunk<T>& chunk) {
  if constexpr (kTerms == 1) {
    put<kRowChunks>(tile, i, chunk);
  } else {
    Chunk<E> terms[kTerms];
    split(terms, chunk);
#pragma unroll
    for (int term = 0; term < kTerms; ++term) put<kRowChunks>(tile + term * apart, i, terms[term]);
  }
}

// How many of `size` rows from `first` on exist; none where the column does not.
PEFTOPS_DEVICE int rows_within(int64_t first, int64_t end, int size, bool column) {
  return column ? static_cast<int>(min_of(end - first, size)) : 0;
}

// One warp's sums over 16 rows and 8 * kTiles columns: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of each
// eight.
template <int kTiles>
struct Sums {
  float value[kTiles][4];
};

PEFTOPS_DEVICE void mma(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bfloat16(d, a, b); }
PEFTOPS_DEVICE void mma(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_float16(d, a, b); }

// Elements k .. k + 3 of the contraction, of row or column i of the product.
template <bool kDown>
PEFTOPS_DEVICE float4 four(const float* tile, int i, int k) {
  if constexpr (!kDown)
    return *reinterpret_cast<const float4*>(at(tile, i / 8, i % 8, k));
  else
    return make_float4(*at(tile, k / 8, k % 8, i), *at(tile, k / 8, k % 8 + 1, i), *at(tile, k / 8, k % 8 + 2, i),
                       *at(tile, k / 8, k % 8 + 3, i));
}

// sums += A B^T over 16 * steps of the contraction, with A from row `first` on. The contraction runs along the rows of a tile, or `down`
// its columns. all: A's infinities and NaN count as well.
template <bool kADown, bool kBDown, class E, int kTiles>
PEFTOPS_DEVICE void multiply(Sums<kTiles>& sums, const E* a, int first, const E* b, int steps, bool all = true) {
#pragma unroll 1  // unrolled, the addresses of all steps would live in registers
  for (int step = 0; step < steps; ++step) {
    if constexpr (sizeof(E) == 2) {
      const int k = 16 * step;
      uint32_t rows[4];
      if constexpr (kADown)
        ldmatrix_x4_trans(rows, at(a, k / 8 + lane() / 16, lane() % 8, first + lane() / 8 % 2 * 8));
      else
        ldmatrix_x4(rows, at(a, first / 8 + lane() / 8 % 2, lane() % 8, k + lane() / 16 * 8));
      if (!all)
        for (uint32_t& pair : rows) pair = finite(pair);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t columns[4];
        if constexpr (kBDown)
          ldmatrix_x4_trans(columns, at(b, k / 8 + lane() / 8 % 2, lane() % 8, 8 * tile + lane() / 16 * 8));
        else
          ldmatrix_x4(columns, at(b, tile + lane() / 16, lane() % 8, k + lane() / 8 % 2 * 8));
        mma(E{}, sums.value[tile], rows, {columns[0], columns[1]});
        mma(E{}, sums.value[tile + 1], rows, {columns[2], columns[3]});
      }
    } else {
#pragma unroll 1
      for (int k = 16 * step; k < 16 * step + 16; k += 4) {
        const float4 low = four<kADown>(a, first + lane() / 4, k), high = four<kADown>(a, first + lane() / 4 + 8, k);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float4 column = four<kBDown>(b, 8 * tile + 2 * (lane() % 4) + j, k);
            float& above = sums.value[tile][j];
            float& below = sums.value[tile][j + 2];
            // Four products on their own: a chain of all would round each of them at the size of the sum.
            above += fmaf(low.w, column.w, fmaf(low.z, column.z, fmaf(low.y, column.y, low.x * column.x)));
            below += fmaf(high.w, column.w, fmaf(high.z, column.z, fmaf(high.y, column.y, high.x * column.x)));
          }
      }
    }
  }
}

// The same for a B that is the sum of kTerms tiles, which lie `apart` elements apart. The smallest terms are added up first, and to what
// `sums` holds in one step, so that they cost no accuracy.
template <bool kADown, bool kBDown, int kTerms, class E, int kTiles>
PEFTOPS_DEVICE void multiply_terms(Sums<kTiles>& sums, const E* a, int first, const E* b, int apart) {
  if constexpr (kTerms == 1) {
    multiply<kADown, kBDown>(sums, a, first, b, kTile / 16);
  } else {
    Sums<kTiles> part{};
#pragma unroll 1
    for (int term = kTerms - 1; term >= 0; --term) multiply<kADown, kBDown>(part, a, first, b + term * apart, kTile / 16, term == 0);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.value[tile][i] += part.value[tile][i];
  }
}

// Calls visit(row, column, sum, sum of the next column) for what this lane holds.
template <int kTiles, class Visit>
PEFTOPS_DEVICE void for_each_pair(const Sums<kTiles>& sums, const Visit& visit) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      visit(lane() / 4 + 8 * half, 8 * tile + 2 * (lane() % 4), sums.value[tile][2 * half], sums.value[tile][2 * half + 1]);
}

// Calls visit(row, column, sum).
template <int kTiles, class Visit>
PEFTOPS_DEVICE void for_each(const Sums<kTiles>& sums, const Visit& visit) {
  for_each_pair(sums, [&](int row, int column, float first, float second) {
    visit(row, column, first);
    visit(row, column + 1, second);
  });
}

PEFTOPS_DEVICE float value_of(const Scale& scale) { return scale.device ? scale.host * *scale.device : scale.host; }

}  // namespace sm80
}  // namespace peftops::lora
