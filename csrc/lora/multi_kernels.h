// The CUDA kernels of several projections of one x behind plain function pointers. multi_cuda.cu plans and launches them; multi_sm80.cuh is
// their code. What they do not take goes projection by projection through the kernels of cuda_kernels.h.
#pragma once

#include "cuda_kernels.h"
#include "multi_plan.h"

namespace peftops::lora {

// sums_j[split][row][rank] = scale_j * keep_j(X) A_j^T over the split's part of the contraction for each projection j, with zeros up to the
// next multiple of eight ranks. X is read once for each block of ranks. Grid: row blocks, splits, rank blocks.
struct MultiShrinkTask {
  const void* x;
  int64_t rows, depth, x_stride;
  int64_t depth_per_split;
  int64_t split_stride, sums_stride;
  uint32_t threshold;
  int64_t mask_stride;
  struct {
    const void* factor;  // [rank, depth]
    int64_t rank, factor_stride;
    Scale scale;
    const int64_t* seed;  // of the mask to draw
    uint8_t* mask;  // written
    float* sums;
  } projections[kSharingProjections];
};

// Y += others + sum_j keep_j(S_j A_j), S_j being the sum of its splits in order, A_j [rank, columns]. Grid: row blocks, column blocks.
struct MultiExpandTask {
  void* y;
  int64_t rows, columns;  // Y and the others are contiguous
  const void* others[kSharingProjections];  // added to Y; null: no more of them
  int64_t columns_per_block, mask_stride;
  bool aligned;  // whole chunks, on 16 bytes
  int32_t count;
  struct {
    const float* sums;  // [splits][rows][sums_stride]
    int64_t splits, sums_stride, rank;
    float* sum;  // [rows][sums_stride], written where it is not null
    const void* factor;
    int64_t factor_stride;
    Scale scale;  // 0: adds nothing
    const uint8_t* mask;
  } projections[kSharingProjections];
};

// For x and factors of one 16-bit type.
struct MultiKernels {
  Kernel<MultiShrinkTask> shrink[2][2], draw[2][2];  // of two and of three projections, by the ranks of a tile
  Kernel<MultiExpandTask> expand, expand_masked;
};

const MultiKernels& multi_kernels_bfloat16();
const MultiKernels& multi_kernels_float16();

}  // namespace peftops::lora
