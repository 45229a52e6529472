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

// Where a tile of the contraction begins. All segments' tiles are one sequence; a segment without depth, or of an adapter that is `off`,
// has none.
struct SegmentTile {
  int segment;  // task.count: behind the last
  int64_t depth;
};

PEFTOPS_HOST_DEVICE bool segment_counts(const Segment& segment, bool off) { return segment.depth > 0 && !(segment.adapter && off); }

PEFTOPS_HOST_DEVICE SegmentTile first_tile(const GemmTask& task, int from, bool off) {
  while (from < task.count && !segment_counts(task.segments[from], off)) ++from;
  return {from, 0};
}

PEFTOPS_HOST_DEVICE SegmentTile next_tile(const GemmTask& task, SegmentTile at, int64_t tile, bool off) {
  at.depth += tile;
  return at.depth < task.segments[at.segment].depth ? at : first_tile(task, at.segment + 1, off);
}

// The kernels from compute capability 8.0 on, W as [columns, depth] and `down`. Operands are in whole chunks: rows start on 16 bytes and
// may be read to the next multiple of eight columns, where, along the contraction, they hold zeros.
struct GemmKernels {
  Kernel<GemmTask> rows, down;
};

const GemmKernels& gemm_sm80_bfloat16();
const GemmKernels& gemm_sm80_float16();

}  // namespace peftops::lora
