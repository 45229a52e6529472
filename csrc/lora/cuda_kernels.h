// The LoRA kernels for CUDA behind plain function pointers. cuda.cu plans and launches them; sm80.cuh is their code.
//
// All work on 64 tokens or 64 columns at a time and read global memory in chunks of eight columns of a row: one 16-byte load of a 16-bit
// type, one Philox block, one byte of keep-bits. So every matrix they read is in whole chunks: rows start on 16 bytes and hold zeros from
// their last column to the next multiple of eight (`padded` in cuda.cu sees to it). Only Y lies as it is.
#pragma once

#include <cstdint>

#include "plan.h"

namespace peftops::lora {

// The factor of a product: host, times what `device` points to where it is not null. 0 means no adapter: sums are zero, exactly.
struct Scale {
  float host;
  const float* device;
};

// Keep-bits [rows, stride bytes].
struct MaskBits {
  uint8_t* data;
  int64_t stride;
};

// sums[split][row][rank] = scale * keep(X) F^T over the split's part of the contraction, with zeros up to sums_stride. F lies as
// [rank, depth], or `down` as [depth, rank]. Grid: row blocks, splits, rank blocks.
struct ShrinkTask {
  const void* x;
  int64_t rows, depth, x_stride;
  const void* factor;
  int64_t rank, factor_stride;
  int64_t depth_per_split;
  Scale scale;
  const int64_t* seed;  // of the mask to draw
  uint32_t threshold;
  MaskBits mask;  // written
  float* sums;
  int64_t sums_stride;
};

// Y += keep(S F^T), S being the sum of its splits in order. F lies as [columns, rank], or `down` as [rank, columns]. Grid: row blocks,
// column blocks.
struct ExpandTask {
  void* y;
  int64_t rows, columns;  // Y is contiguous
  const float* sums;      // [splits][rows][sums_stride]
  int64_t splits, rank, sums_stride;
  float* sum;  // [rows][sum_stride], written where it is not null
  int64_t sum_stride;
  const void* factor;
  int64_t factor_stride;
  int64_t columns_per_block;
  Scale scale;  // 0: Y is left alone
  MaskBits mask;
  bool y_aligned;  // whole chunks, on 16 bytes
};

// gradient[feature, rank] = keep(G)^T S, whole into `gradient` (the factors' type) or per split into `partials` [splits][features * rank].
// Grid: feature blocks, splits of the tokens, rank blocks.
struct GradientTask {
  const void* g;
  int64_t rows, features, g_stride;
  const float* s;  // [rows][s_stride]
  int64_t rank, s_stride;
  int64_t rows_per_split;
  Scale scale;  // 0: the gradient is zero
  MaskBits mask;
  void* gradient;
  float* partials;
  int64_t feature_stride, rank_stride;
};

// out[i] = sum of its splits in order, for up to two results. Grid: blocks of kFinishThreads, results.
struct FinishTask {
  struct {
    const float* partials;  // [splits][count]
    int64_t splits, count;
    void* out;
  } results[2];
};

// S as the sum of its splits in order: as it is, and as a GEMM's operand of a 16-bit type. Grid: row blocks.
struct OperandTask {
  const float* sums;  // [splits][rows][sums_stride]
  int64_t splits, rows, sums_stride;
  float* sum;  // [rows][sum_stride], written where it is not null
  int64_t sum_stride;
  void* operand;  // [rows][sums_stride], with float32 factors [S1 | S1 | S2] three times as wide, S = S1 + S2
};

// A float32 factor [lines, columns] as a GEMM's operand: F1, F2 and F1 for F = F1 + F2, each [whole_lines, whole_columns] in bfloat16
// with zeros around, and `apart`. Grid: blocks of 64 columns, blocks of 16 lines, one after another where CUDA launches no more.
struct FactorTask {
  const float* factor;
  int64_t stride, lines, columns, whole_lines, whole_columns;
  void* operand;
  int64_t operand_stride, apart;
};
constexpr int kFactorLines = 16;

// keep[row, column] for `lora_dropout_mask`, a thread for each eight columns. Grid: as many blocks as there are, one after another where
// CUDA launches no more.
struct DropoutMaskTask {
  const int64_t* seed;
  int64_t rows, columns;
  uint32_t threshold;
  bool* keep;
};

template <class Task>
using Kernel = void (*)(const Task);

// Kernels for one pair of types: x, weight and y in the first, lora_a and lora_b in the second.
struct Kernels {
  int element_bytes;               // of what is multiplied: the 16-bit type on tensor cores, or float32
  int terms;                       // 16-bit numbers that a float32 factor's number is the sum of; 1: none is split
  Kernel<ShrinkTask> shrink[3];    // F as [rank, depth]
  Kernel<ShrinkTask> draw[3];      // the same under a mask that it draws
  Kernel<ShrinkTask> shrink_down[3];
  Kernel<ExpandTask> expand, expand_down, expand_down_masked;
  Kernel<GradientTask> gradient[2], gradient_masked[2];
  Kernel<FinishTask> finish;    // into the second type
  Kernel<OperandTask> operand;  // null where there is no GEMM of this room for the types
};

Kernel<DropoutMaskTask> dropout_mask_kernel();
Kernel<FactorTask> factor_operand_kernel();

const Kernels& kernels_float32();
const Kernels& kernels_bfloat16();
const Kernels& kernels_float16();
const Kernels& kernels_bfloat16_float32();
const Kernels& kernels_float16_float32();
}  // namespace peftops::lora
