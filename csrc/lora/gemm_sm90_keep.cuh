// Keep-bits of the accumulators of wgmma. Host and device.
//
// Of a tile, thread t of the consumer warpgroups holds rows `row` + 8 i + 64 m and, of each eight columns, `column` and the next: two bits
// of one byte. So four lanes share rows. Each loads every fourth word of a row, 32 columns, and they exchange them.
#pragma once

#include "../common/ptx.cuh"
#include "gemm.h"

namespace peftops::lora::sm90 {

struct FragmentPlace {
  int row, column;
};

PEFTOPS_HOST_DEVICE constexpr FragmentPlace fragment_place(int thread) {
  return {thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
}

// The bits of 32 columns of a row from byte `byte` on; zeros beyond the matrix.
PEFTOPS_HOST_DEVICE uint32_t keep_word(MaskBits mask, int64_t rows, int64_t row, int64_t byte) {
  uint32_t word = 0;
  if (row >= rows) return word;
  const uint8_t* line = mask.data + row * mask.stride + byte;
  if (mask.stride % 4 == 0 && reinterpret_cast<uintptr_t>(mask.data) % 4 == 0) {
    if (byte < mask.stride) word = *reinterpret_cast<const uint32_t*>(line);
  } else {
    for (int i = 0; i < 4; ++i)
      if (byte + i < mask.stride) word |= static_cast<uint32_t>(line[i]) << 8 * i;
  }
  return word;
}

// What a thread of a tile loads.
template <int kTileRows, int kTileColumns, int kThreads>
struct KeepBits {
  static constexpr int kRows = kTileRows * 4 / kThreads;
  static constexpr int kWords = kTileColumns / 32;
  uint32_t words[kRows][kWords / 4];

  // The tile starts at `place`: row, column.
  PEFTOPS_MEMBER void load(MaskBits mask, int64_t rows, int2 place, int thread) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int word = 0; word < kWords / 4; ++word)
        words[row][word] = keep_word(mask, rows, int64_t{place.x} + fragment_place(thread).row + row % 2 * 8 + row / 2 * 64,
                                     place.y / 8 + 4 * (4 * word + thread % 4));
    }
  }

  // Makes sums zero whose bits are. sum(j, i, g, m) is that in column `column` + j of the g-th eight, row `row` + 8 i + 64 m;
  // exchanged(row, word, lane) is words[row][word] of one of the four lanes.
  template <class Sum, class Exchanged>
  PEFTOPS_MEMBER static void apply(int thread, const Sum& sum, const Exchanged& exchanged) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint32_t bits = exchanged(row, word / 4, word % 4) >> fragment_place(thread).column;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            float& value = sum(column, row % 2, 4 * word + byte, row / 2);
            value = bits >> (8 * byte + column) & 1 ? value : 0.0f;
          }
        }
      }
    }
  }
};

}  // namespace peftops::lora::sm90
