// Products with a packed weight, the kernels of one instruction-set level behind plain function pointers.
//
// The packed form is the same at every level and for every dtype: [ceil(N / 16)][ceil(K / 2)][16][2], element [i, k, j, l] =
// weight[16 i + j, 2 k + l], zero beyond the weight. A block is one i; a step is one k of a block, 32 numbers that lie together.
#pragma once

#include <cstdint>

#include "../common/parallel.h"
#include "cpu_kernels.h"

namespace peftops::lora::packed {

// A strided [rows, columns] matrix.
struct Strided {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};

// One pair of operands of a sum: x in strips (StripTask) and a packed weight, `steps` long.
struct Segment {
  const void* x;
  const void* weight;
  int64_t steps;
};

// y = x W^T + S B^T + bias, one accumulator, one rounding. Tasks: groups of `Kernels::group` blocks of 16 columns.
struct LinearTask {
  int64_t rows, out_features;
  Segment base, lora;  // lora.x is null where there is no adapter
  Strided b;           // [out_features, rank]
  void* packed_b;      // lora.weight: each task packs the blocks of B that it needs
  const void* bias;    // null: none
  void* y;             // [rows, out_features]
};

// Contiguous rows of x (or of S) as the kernel takes them: strips of rows, [steps][rows] each. Tasks: kPackedChunk steps of all rows.
struct StripTask {
  const void* from;
  int64_t rows, columns;
  void* to;
};

// Kernels for one pair of storage types: x, weight, y in the first, lora_a and lora_b in the second.
struct Kernels {
  int64_t group;
  int64_t element, factor_element;  // bytes of a step of one row, of x and of S
  void (*pack)(const Strided& weight, void* packed, int64_t begin, int64_t end);  // blocks
  void (*strip_rows)(const StripTask&, int64_t begin, int64_t end);
  void (*strip_sums)(const StripTask&, int64_t begin, int64_t end);
  void (*linear)(const LinearTask&, int64_t begin, int64_t end);
};

struct LevelKernels {
  const Kernels& (*find)(Storage x, Storage factors);
};

const LevelKernels& kernels_baseline();
const LevelKernels& kernels_avx2();
const LevelKernels& kernels_avx512();

}  // namespace peftops::lora::packed
