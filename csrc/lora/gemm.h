// Segmented-K GEMM: D = column_scale * (sum_j X_j W_j^T) + bias, one float32 accumulator per element of D.
//
// It serves LoRA's forward, [x | S] [W | B]^T, its gradient of x, [dY | dS] [W; A], projections that share x, several adapters, and float32
// factors, whose bfloat16 parts are segments.
#pragma once

#include "cuda_kernels.h"

namespace peftops::lora {

// X [rows, depth] and W, as [columns, depth] or `down` as [depth, columns]; 16-bit, of one type.
struct Segment {
  const void* x;
  int64_t x_stride;
  const void* w;
  int64_t w_stride;
  bool down;
  int64_t depth;
  bool adapter;  // left out where the scale is 0
};

constexpr int kMaxSegments = 4;

struct GemmTask {
  Segment segments[kMaxSegments];
  int count;
  void* d;  // the segments' type
  int64_t rows, columns, d_stride;
  const void* bias;  // [columns], the segments' type; may be null
  const float* column_scale;  // [columns]; null: 1
  Scale scale;  // 0: the adapter's segments add nothing
  MaskBits mask;  // of the sum of segment 0; data null: everything is kept
};

}  // namespace peftops::lora
