// How a LoRA problem is cut up: pure host functions of the problem, never of the thread count, so that results do not depend on it.
#pragma once

#include <cstdint>

#include "../common/index.h"

namespace peftops::lora {

constexpr int64_t kRowBlock = 64;       // tokens per task, and per pass of a column panel
constexpr int64_t kColumnChunk = 256;   // features unpacked at a time: 64 KiB of float32 beside 64 rows
constexpr int64_t kRankBlock = 64;      // ranks summed at a time
constexpr int64_t kExpandColumns = 1024;  // features per up-projection task
constexpr int64_t kSmallRows = 16;      // up to here, without grad, our own kernel makes the base product as well
constexpr int64_t kSmallBlock = 8;      // weight rows per step of that kernel
constexpr int64_t kSmallPiece = 1024;    // features per step of that kernel, for more than four rows

// Features per step of the few-row kernel. More than four tokens go over a weight row several times, so they go piece by piece: eight
// weight rows of a piece fit the first cache. Four or fewer go over it once.
inline int64_t small_piece(int64_t rows, int64_t features) { return rows <= 4 ? features : kSmallPiece; }

// Width of the column panels of the gradient pass: about 16 panels, so that many threads have work, but no narrower than 128,
// because each panel writes a partial [rows, rank] sum.
inline int64_t gradient_panel(int64_t features) {
  const int64_t width = round_up(ceil_div(features, 16), 64);
  return width < 128 ? 128 : min_of(width, kColumnChunk);
}

}  // namespace peftops::lora
