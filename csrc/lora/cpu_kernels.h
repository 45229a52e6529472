// The LoRA kernels of one instruction-set level, behind plain function pointers. Each works on a range of its tasks; cpu.cpp
// spreads the tasks over torch's threads.
#pragma once

#include <cstdint>

#include "../common/parallel.h"

namespace peftops::lora {

enum class Storage { float32, bfloat16, float16, float64 };

// How a product is formed: `wide` converts to the accumulator type (float32, float64 for float64) first; `dot` multiplies pairs
// of bfloat16 exactly and adds them to a float32 (AVX-512 BF16).
enum class Arithmetic { wide, dot };

// A strided [contraction, lanes] matrix.
struct Matrix {
  const void* data;
  int64_t contraction, lanes, stride, lane_stride;
};

// Keep-bits [rows, stride bytes]; data is null where there is no dropout.
struct Mask {
  uint8_t* data;
  int64_t stride;
};

// A matrix as the kernels want it, [contraction / step][stride]: elements of the arithmetic (one number, or a pair of bfloat16
// along the contraction), lanes padded with zeros to whole vectors.
struct Packed {
  void* data;
  int64_t stride;
};

// A pass over x, dY or dX serves one projection or several, its parts. Their packed factors lie side by side: the part's ranks are the
// lanes from `column` on. Either each part has a mask or none.
//
// Where a task has an index, its row i is row index[i] of x, y or g. The index has kRowBlock entries more than rows, any rows of the
// matrix: those are asked for ahead, never used. There is no mask then.
struct ProjectPart {
  int64_t column, rank;
  double factor;
  uint64_t seed;
  Mask mask;
  void* s;  // accumulators [rows, rank]
};

// S = factor * keep(x) A^T. Tasks: blocks of kRowBlock rows.
struct ProjectTask {
  const void* x;
  int64_t rows, features, x_stride;
  Packed a;  // features by ranks
  const ProjectPart* parts;
  int64_t count, s_stride;
  bool draw;  // draw the masks (and write them) instead of reading them
  uint32_t threshold;
  const int64_t* index = nullptr;
};

struct ExpandPart {
  const void* s;  // elements [rows][s_stride], `depth` of them
  int64_t s_stride, depth;
  Packed b;  // ranks by features
  Mask mask;
};

// Y += keep(S B), summed over the parts. Tasks: row blocks times blocks of kExpandColumns columns, columns fastest.
struct ExpandTask {
  void* y;
  int64_t rows, features, y_stride;
  const ExpandPart* parts;
  int64_t count;
  const int64_t* index = nullptr;
};

struct GradientPart {
  int64_t column, rank;
  Mask mask;
  void* gradient;
  int64_t feature_stride, rank_stride;
};

// gradient[feature, rank] = keep(G)^T S, and beside it partial sums of G (unmasked) times a factor. Tasks: column panels.
struct GradientTask {
  const void* g;
  int64_t rows, features, g_stride, panel;
  int64_t width;  // lanes of s and b
  Packed s;       // rows by ranks
  const GradientPart* parts;
  int64_t count;   // 0 where no gradient is wanted
  Packed b;        // features by ranks; data null where the partial sums are not wanted
  void* partials;  // accumulators [panels][padded rows][width]
  const int64_t* index = nullptr;
};

// Consecutive tokens of a few-row product that share an adapter.
struct SmallRun {
  int64_t first, rows;
  const void* s;  // accumulators [rows, rank]
  const void* b;  // [out_features][b_stride], the factor's storage
  int64_t rank;
};

// y = factor * (x W^T + S B^T) + bias for few rows. Tasks: blocks of kSmallBlock weight rows.
struct SmallTask {
  const void* x;  // pieces of small_piece features, [rows][piece] each
  const void* weight;
  const void* bias;
  int64_t rows, features, out_features, weight_stride;
  const void* s;  // accumulators [rows, rank]; null: no second segment
  const void* b;  // [out_features][b_stride], the factor's storage
  int64_t rank, b_stride;
  double factor;  // of the products, not of the bias
  void* y;        // [rows, out_features]
  const SmallRun* runs;  // instead of s and b: each run's own second segment
  int64_t run_count;
};

// Kernels for one pair of storage types: x, weight, y in the first, lora_a and lora_b in the second.
struct Kernels {
  Arithmetic arithmetic;
  int64_t step;      // numbers per element
  int64_t element;   // bytes per element
  int64_t lanes;     // padding unit of ranks and features
  void (*pack_factor)(const Matrix&, Packed, int64_t begin, int64_t end);  // rows of the packed form
  void (*pack_sums)(const Matrix&, Packed, int64_t begin, int64_t end);    // the same from accumulators
  void (*pack_ranks)(const void* s, int64_t s_stride, int64_t rows, int64_t rank, Packed elements);
  void (*project)(const ProjectTask&, int64_t begin, int64_t end);
  void (*expand)(const ExpandTask&, int64_t begin, int64_t end);
  void (*gradient)(const GradientTask&, int64_t begin, int64_t end);
  void (*reduce)(const void* partials, int64_t panels, int64_t panel_stride, int64_t padded_rank, int64_t rank, double factor, void* s,
                 int64_t s_stride, int64_t begin, int64_t end);  // rows
  void (*small_linear)(const SmallTask&, int64_t begin, int64_t end);
  void (*small_project)(const SmallTask&, int64_t begin, int64_t end);  // S = x A^T: weight is lora_a, y holds accumulators
};

struct LevelKernels {
  const Kernels& (*find)(Storage x, Storage factors);
  void (*dropout_bytes)(uint64_t seed, int64_t row, int64_t begin, int64_t count, uint32_t threshold, uint8_t* out);
};

const LevelKernels& kernels_baseline();
const LevelKernels& kernels_avx2();
const LevelKernels& kernels_avx512();

}  // namespace peftops::lora
