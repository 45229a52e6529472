// What the CPU operators of this room share: the level's kernels, matrices as the kernels take them, and one call's buffers and passes.
#pragma once

#include <cstring>

#include "../common/index.h"
#include "cpu_kernels.h"
#include "lora.h"
#include "plan.h"

namespace peftops::lora {

inline const LevelKernels& level_kernels() {
  static const LevelKernels& kernels = [&]() -> const LevelKernels& {
    switch (cpu_level()) {
#ifdef PEFTOPS_X86
      case CpuLevel::avx512: return kernels_avx512();
      case CpuLevel::avx2: return kernels_avx2();
#endif
      default: return kernels_baseline();
    }
  }();
  return kernels;
}

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::float32;
  }
}

inline double value_of(double scale, const std::optional<Tensor>& tensor_scale) {
  return tensor_scale ? scale * *tensor_scale->const_data_ptr<float>() : scale;
}

// lora_linear on the CPU without dropout: what other operators of the room do with few rows. Defined in cpu.cpp.
Tensor linear_on_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                     double scale);

// A 2-D tensor with its rows along the contraction, and with its columns there.
inline Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.lanes, m.contraction, m.lane_stride, m.stride}; }

// Runs body(begin, end) over the tasks on torch's threads, `grain` tasks or more on each.
template <class Body>
void spread(int64_t tasks, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, tasks, grain < 1 ? 1 : grain, body);
}

// What a pass over x, Y or G does for one projection. S has accumulators, its rows `s_stride` apart.
struct Projection {
  Tensor lora_a;
  double factor;
  uint64_t seed;
  Mask mask;
  void* s;
};

struct Product {
  const void* s;
  int64_t s_stride;
  Matrix b;  // [rank, features]
  Mask mask;
};

struct FactorGradient {
  Matrix s;  // [rows, rank]
  Mask mask;
  void* gradient;
  int64_t feature_stride, rank_stride;
};

// One call's kernels and scratch; scratch comes from torch's allocator and lives as long as the call.
class Call {
 public:
  Call(const Tensor& x, const Tensor& lora_a) : kernels(level_kernels().find(storage_of(x), storage_of(lora_a))), like_(x) {}

  const Kernels& kernels;

  int64_t padded(int64_t n) const { return round_up(n, kernels.lanes); }

  Packed scratch(int64_t rows, int64_t stride) {
    buffers_.push_back(
        empty_on(like_, ScalarType::Byte, checked_product(checked_product(rows, stride, "scratch"), kernels.element, "scratch")));
    return {buffers_.back().mutable_data_ptr(), stride};
  }

  // Factors of one contraction, side by side, each padded to whole vectors.
  Packed pack(const std::vector<Matrix>& factors) {
    const int64_t steps = ceil_div(factors.front().contraction, kernels.step);
    const Packed packed = scratch(steps, width_of(factors));
    for_each_place(factors, packed, [&](const Matrix& factor, const Packed& place) {
      spread(steps, ceil_div(1 << 16, factor.lanes + 1),
             [&](int64_t begin, int64_t end) { kernels.pack_factor(factor, place, begin, end); });
    });
    return packed;
  }

  // S_j = factor_j * keep_j(x) A_j^T for each projection in one pass over x, drawing the masks where `draw` says so.
  void project(const Rows& x, const std::vector<Projection>& projections, int64_t s_stride, bool draw, uint32_t threshold) {
    std::vector<Matrix> factors;
    std::vector<ProjectPart> parts;
    int64_t column = 0;
    for (const Projection& p : projections) {
      factors.push_back(transposed(matrix_of(p.lora_a)));
      parts.push_back({column, p.lora_a.size(0), p.factor, p.seed, p.mask, p.s});
      column += padded(p.lora_a.size(0));
    }
    const ProjectTask task{x.data(), x.rows, x.columns, x.stride, pack(factors), parts.data(), count_of(parts), s_stride, draw, threshold};
    spread(ceil_div(x.rows, kRowBlock), 1, [&](int64_t begin, int64_t end) { kernels.project(task, begin, end); });
  }

  // The same for one: S is new.
  Tensor project(const Rows& x, const Tensor& lora_a, double factor, bool draw, uint64_t seed, uint32_t threshold, Mask mask) {
    Tensor s = empty_on(like_, accumulator_of(like_), x.rows, lora_a.size(0));
    project(x, {{lora_a, factor, seed, mask, s.mutable_data_ptr()}}, s.size(1), draw, threshold);
    return s;
  }

  // Y += keep_j(S_j B_j), summed over the products, with Y contiguous, in one pass over Y.
  void expand(const Tensor& y, int64_t rows, int64_t features, const std::vector<Product>& products) {
    std::vector<ExpandPart> parts;
    for (const Product& p : products) {
      const int64_t rank = p.b.contraction, depth = ceil_div(rank, kernels.step);
      Packed elements{const_cast<void*>(p.s), p.s_stride};
      if (kernels.step > 1) {
        elements = scratch(rows, depth);
        kernels.pack_ranks(p.s, p.s_stride, rows, rank, elements);
      }
      parts.push_back({elements.data, elements.stride, depth, pack({p.b}), p.mask});
    }
    const ExpandTask task{y.mutable_data_ptr(), rows, features, features, parts.data(), count_of(parts)};
    const int64_t tasks = ceil_div(rows, kRowBlock) * ceil_div(features, kExpandColumns);
    spread(tasks, 1, [&](int64_t begin, int64_t end) { kernels.expand(task, begin, end); });
  }

  // Y += keep(S B), with Y contiguous and B as [rank, features].
  void expand(const Tensor& y, int64_t features, const Tensor& s, const Matrix& b, Mask mask) {
    expand(y, s.size(0), features, {{s.const_data_ptr(), s.size(1), b, mask}});
  }

  // gradient_j = keep_j(G)^T S_j for each of them, and, where B is given, factor * G B into `sum`, all in one pass over G.
  void gradient(const Rows& g, const std::vector<FactorGradient>& gradients, const Matrix* b, double factor, void* sum,
                int64_t sum_stride) {
    const int64_t rows = g.rows, panel = gradient_panel(g.columns), panels = ceil_div(g.columns, panel);
    const int64_t padded_rows = round_up(rows, kRowBlock);
    std::vector<Matrix> sums;
    std::vector<GradientPart> parts;
    GradientTask task{};
    for (const FactorGradient& f : gradients) {
      sums.push_back(f.s);
      parts.push_back({task.width, f.s.lanes, f.mask, f.gradient, f.feature_stride, f.rank_stride});
      task.width += padded(f.s.lanes);
    }
    task.g = g.data();
    task.rows = rows, task.features = g.columns, task.g_stride = g.stride, task.panel = panel;
    task.parts = parts.data(), task.count = count_of(parts);
    if (task.count) task.s = pack_sums(sums);
    Tensor partials;
    if (b) {
      task.b = pack({*b}), task.width = task.b.stride;
      partials = empty_on(like_, accumulator_of(like_), panels, padded_rows, task.width);
      task.partials = partials.mutable_data_ptr();
    }
    spread(panels, 1, [&](int64_t begin, int64_t end) { kernels.gradient(task, begin, end); });
    if (!b) return;
    spread(rows, 64, [&](int64_t begin, int64_t end) {
      kernels.reduce(partials.const_data_ptr(), panels, padded_rows * task.width, task.width, b->lanes, factor, sum, sum_stride, begin,
                     end);
    });
  }

  // gradient = keep(G)^T S into a [features, rank] view, and, where B is given, factor * G B in the same pass.
  std::optional<Tensor> gradient(const Rows& g, const Tensor* s, Tensor* gradient_to, int64_t feature_stride, int64_t rank_stride,
                                 int64_t rank, const Matrix* b, double factor, Mask mask) {
    std::vector<FactorGradient> gradients;
    if (gradient_to) gradients.push_back({matrix_of(*s), mask, gradient_to->mutable_data_ptr(), feature_stride, rank_stride});
    std::optional<Tensor> sum;
    if (b) sum = empty_on(like_, accumulator_of(like_), g.rows, rank);
    gradient(g, gradients, b, factor, sum ? sum->mutable_data_ptr() : nullptr, rank);
    return sum;
  }

 private:
  // Sums [rows, rank] in the same way.
  Packed pack_sums(const std::vector<Matrix>& sums) {
    const int64_t steps = ceil_div(sums.front().contraction, kernels.step);
    const Packed packed = scratch(steps, width_of(sums));
    for_each_place(sums, packed, [&](const Matrix& s, const Packed& place) { kernels.pack_sums(s, place, 0, steps); });
    return packed;
  }

  int64_t width_of(const std::vector<Matrix>& matrices) const {
    int64_t width = 0;
    for (const Matrix& m : matrices) width += padded(m.lanes);
    return width;
  }

  template <class Body>
  void for_each_place(const std::vector<Matrix>& matrices, Packed place, const Body& body) const {
    for (const Matrix& m : matrices) {
      body(m, place);
      place.data = static_cast<char*>(place.data) + padded(m.lanes) * kernels.element;
    }
  }

  template <class T>
  static int64_t count_of(const std::vector<T>& items) {
    return static_cast<int64_t>(items.size());
  }

  Tensor like_;
  std::vector<Tensor> buffers_;
};

// Contiguous rows for the few-row kernel, kSmallRows at a time, each time piece by piece: whole rows are often a power of two apart and
// would meet in the same lines of the cache.
inline Tensor by_piece(const Tensor& x, int64_t rows, int64_t features) {
  const int64_t size = static_cast<int64_t>(x.element_size());
  if (small_piece(rows, features, size) >= features) return x;
  Tensor pieces = empty_on(x, x.scalar_type(), rows, features);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(pieces.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row += kSmallRows) {
    const int64_t end = min_of(row + kSmallRows, rows), piece = small_piece(end - row, features, size);
    for (int64_t k = 0; k < features; k += piece) {
      const int64_t bytes = min_of(piece, features - k) * size;
      for (int64_t i = row; i < end; ++i, to += bytes) std::memcpy(to, from + (i * features + k) * size, static_cast<size_t>(bytes));
    }
  }
  return pieces;
}

// Tasks of the few-row kernel that are worth a thread: about 2^17 products.
inline int64_t small_grain(int64_t rows, int64_t products) { return ceil_div(1 << 17, kSmallBlock * (rows * products + 1)); }

// S = factor * x A^T by the few-row kernel; x from by_piece.
inline Tensor few_row_sums(const Tensor& pieces, int64_t rows, const Tensor& lora_a, double factor) {
  const Kernels& kernels = level_kernels().find(storage_of(pieces), storage_of(lora_a));
  const int64_t rank = lora_a.size(0), features = lora_a.size(1), blocks = ceil_div(rank, kSmallBlock);
  const Tensor a = with_unit_stride(lora_a);
  Tensor s = empty_on(pieces, accumulator_of(pieces), rows, rank);
  const char* x = static_cast<const char*>(pieces.const_data_ptr());
  char* out = static_cast<char*>(s.mutable_data_ptr());
  spread(ceil_div(rows, kSmallRows) * blocks, small_grain(min_of(rows, kSmallRows), features), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / blocks * kSmallRows;
      SmallTask task{};
      task.x = x + row * features * static_cast<int64_t>(pieces.element_size());
      task.weight = a.const_data_ptr(), task.weight_stride = a.stride(0);
      task.rows = min_of(kSmallRows, rows - row), task.features = features, task.out_features = rank;
      task.factor = factor;
      task.y = out + row * rank * static_cast<int64_t>(s.element_size());
      kernels.small_project(task, at % blocks, at % blocks + 1);
    }
  });
  return s;
}

inline Mask mask_of(const Tensor& mask) {
  return mask.dim() == 2 ? Mask{static_cast<uint8_t*>(mask.data_ptr()), mask.size(1)} : Mask{nullptr, 0};
}

}  // namespace peftops::lora
