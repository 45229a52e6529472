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

// A 2-D tensor with its rows along the contraction, and with its columns there.
inline Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.lanes, m.contraction, m.lane_stride, m.stride}; }

// Runs body(begin, end) over the tasks on torch's threads, `grain` tasks or more on each.
template <class Body>
void spread(int64_t tasks, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, tasks, grain < 1 ? 1 : grain, body);
}

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

  Packed pack(const Matrix& factor) {
    const Packed packed = scratch(ceil_div(factor.contraction, kernels.step), padded(factor.lanes));
    spread(ceil_div(factor.contraction, kernels.step), ceil_div(1 << 16, factor.lanes + 1),
           [&](int64_t begin, int64_t end) { kernels.pack_factor(factor, packed, begin, end); });
    return packed;
  }

  // S = factor * keep(x) A^T, drawing the mask where `draw` says so.
  Tensor project(const Rows& x, const Tensor& lora_a, double factor, bool draw, uint64_t seed, uint32_t threshold, Mask mask) {
    const int64_t rows = x.rows, rank = lora_a.size(0);
    Tensor s = empty_on(like_, accumulator_of(like_), rows, rank);
    const ProjectTask task{x.data(), rows, x.columns, x.stride,  rank, pack(transposed(matrix_of(lora_a))),
                           factor,   draw, seed,      threshold, mask, s.mutable_data_ptr()};
    spread(ceil_div(rows, kRowBlock), 1, [&](int64_t begin, int64_t end) { kernels.project(task, begin, end); });
    return s;
  }

  // Y += keep(S B), with Y contiguous and B as [rank, features].
  void expand(const Tensor& y, int64_t features, const Tensor& s, const Matrix& b, Mask mask) {
    const int64_t rows = s.size(0);
    Packed elements{s.mutable_data_ptr(), b.contraction};
    if (kernels.step > 1) {
      elements = scratch(rows, ceil_div(b.contraction, kernels.step));
      kernels.pack_ranks(s.const_data_ptr(), rows, b.contraction, elements);
    }
    const ExpandTask task{y.mutable_data_ptr(), rows, features, features, elements.data, elements.stride, pack(b), mask};
    const int64_t tasks = ceil_div(rows, kRowBlock) * ceil_div(features, kExpandColumns);
    spread(tasks, 1, [&](int64_t begin, int64_t end) { kernels.expand(task, begin, end); });
  }

  // gradient = keep(G)^T S into a [features, rank] view, and, where B is given, factor * G B in the same pass.
  std::optional<Tensor> gradient(const Rows& g, const Tensor* s, Tensor* gradient, int64_t feature_stride, int64_t rank_stride,
                                 int64_t rank, const Matrix* b, double factor, Mask mask) {
    const int64_t rows = g.rows, features = g.columns, panel = gradient_panel(features), panels = ceil_div(features, panel);
    const int64_t padded_rows = round_up(rows, kRowBlock), padded_rank = padded(rank);
    GradientTask task{};
    task.g = g.data();
    task.rows = rows, task.features = features, task.g_stride = g.stride, task.rank = rank, task.panel = panel, task.mask = mask;
    if (gradient) {
      task.s = scratch(ceil_div(rows, kernels.step), padded_rank);
      kernels.pack_sums(matrix_of(*s), task.s, 0, ceil_div(rows, kernels.step));
      task.gradient = gradient->mutable_data_ptr();
      task.gradient_feature_stride = feature_stride, task.gradient_rank_stride = rank_stride;
    }
    Tensor partials;
    if (b) {
      task.b = pack(*b);
      partials = empty_on(like_, accumulator_of(like_), panels, padded_rows, padded_rank);
      task.partials = partials.mutable_data_ptr();
    }
    spread(panels, 1, [&](int64_t begin, int64_t end) { kernels.gradient(task, begin, end); });
    if (!b) return std::nullopt;
    Tensor sum = empty_on(like_, accumulator_of(like_), rows, rank);
    spread(rows, 64, [&](int64_t begin, int64_t end) {
      kernels.reduce(partials.const_data_ptr(), panels, padded_rows * padded_rank, padded_rank, rank, factor, sum.mutable_data_ptr(), begin,
                     end);
    });
    return sum;
  }

 private:
  Tensor like_;
  std::vector<Tensor> buffers_;
};

// Contiguous rows for the few-row kernel, kSmallRows at a time, each time piece by piece: whole rows are often a power of two apart and
// would meet in the same lines of the cache.
inline Tensor by_piece(const Tensor& x, int64_t rows, int64_t features) {
  if (small_piece(rows, features) >= features) return x;
  const int64_t size = static_cast<int64_t>(x.element_size());
  Tensor pieces = empty_on(x, x.scalar_type(), rows, features);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(pieces.mutable_data_ptr());
  for (int64_t row = 0; row < rows; row += kSmallRows) {
    const int64_t end = min_of(row + kSmallRows, rows), piece = small_piece(end - row, features);
    for (int64_t k = 0; k < features; k += piece) {
      const int64_t bytes = min_of(piece, features - k) * size;
      for (int64_t i = row; i < end; ++i, to += bytes) std::memcpy(to, from + (i * features + k) * size, static_cast<size_t>(bytes));
    }
  }
  return pieces;
}

// Tasks of the few-row kernel that are worth a thread: about 2^15 products.
inline int64_t small_grain(int64_t rows, int64_t products) { return ceil_div(1 << 15, kSmallBlock * (rows * products + 1)); }

inline Mask mask_of(const Tensor& mask) {
  return mask.dim() == 2 ? Mask{static_cast<uint8_t*>(mask.data_ptr()), mask.size(1)} : Mask{nullptr, 0};
}

}  // namespace peftops::lora
