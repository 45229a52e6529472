// LoRA on the CPU: checks, plan, buffers and registration. The arithmetic is in cpu_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/index.h"
#include "../common/philox.h"
#include "cpu_kernels.h"
#include "lora.h"
#include "plan.h"

namespace peftops::lora {
namespace {

const LevelKernels& level_kernels() {
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

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::float32;
  }
}

double value_of(double scale, const std::optional<Tensor>& tensor_scale) {
  return tensor_scale ? scale * *tensor_scale->const_data_ptr<float>() : scale;
}

// A 2-D tensor with its rows along the contraction, and with its columns there.
Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }
Matrix transposed(const Matrix& m) { return {m.data, m.lanes, m.contraction, m.lane_stride, m.stride}; }

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

// x for the few-row kernel, piece by piece: whole rows are often a power of two apart and would meet in the same lines of the cache.
Tensor by_piece(const Tensor& x, int64_t rows, int64_t features) {
  const int64_t piece = small_piece(rows, features);
  if (piece >= features) return x;
  const int64_t size = static_cast<int64_t>(x.element_size());
  Tensor pieces = empty_on(x, x.scalar_type(), rows, features);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(pieces.mutable_data_ptr());
  for (int64_t k = 0; k < features; k += piece) {
    const int64_t bytes = min_of(piece, features - k) * size;
    for (int64_t i = 0; i < rows; ++i, to += bytes) std::memcpy(to, from + (i * features + k) * size, static_cast<size_t>(bytes));
  }
  return pieces;
}

Mask mask_of(const Tensor& mask) { return mask.dim() == 2 ? Mask{static_cast<uint8_t*>(mask.data_ptr()), mask.size(1)} : Mask{nullptr, 0}; }

// Y = x W^T + bias by the vendor's GEMM, and beside it S and the mask where there is an adapter.
std::tuple<Tensor, Tensor, Tensor> forward(const Problem& problem, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& lora_a, const Tensor& lora_b, double scale, double dropout_p,
                                           const std::optional<Tensor>& seed) {
  const auto& [features, out_features, rank] = problem;
  const int64_t rows = rows_of(x);
  const Tensor y = base_product(x, weight, bias);
  const bool drops = dropout_p > 0.0;
  if (scale == 0.0)
    return {y, zeros_on(x, accumulator_of(x), rows, rank),
            drops ? zeros_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0)};
  Tensor mask = drops ? empty_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0);
  Call call(x, lora_a);
  const uint64_t key = drops ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0;
  const Tensor s =
      call.project(Rows(x, features), lora_a, scale / (1.0 - dropout_p), drops, key, dropout_threshold(dropout_p), mask_of(mask));
  call.expand(y, out_features, s, transposed(matrix_of(lora_b)), Mask{nullptr, 0});
  return {y, s, mask};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       double scale, std::optional<Tensor> tensor_scale, double dropout_p,
                                                       std::optional<Tensor> seed) {
  const Problem problem = check_forward(x, weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  return forward(problem, x, weight, bias, lora_a, lora_b, value_of(scale, tensor_scale), dropout_p, seed);
}

// The result alone; few rows get the kernel that reads the weight once.
Tensor lora_linear_any(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                       double scale, const std::optional<Tensor>& tensor_scale, double dropout_p, const std::optional<Tensor>& seed) {
  const Problem problem = check_forward(x, weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  const auto& [features, out_features, rank] = problem;
  const double factor = value_of(scale, tensor_scale);
  const int64_t rows = rows_of(x);
  const bool small = rows <= kSmallRows && dropout_p == 0.0 && factor != 0.0 && (features <= 1 || weight.stride(1) == 1);
  if (!small) return std::get<0>(forward(problem, x, weight, bias, lora_a, lora_b, factor, dropout_p, seed));

  const Kernels& kernels = level_kernels().find(storage_of(x), storage_of(lora_a));
  const Tensor tokens = by_piece(as_contiguous(x), rows, features);
  const Tensor a = with_unit_stride(lora_a), b = with_unit_stride(lora_b);
  Tensor s = empty_on(x, accumulator_of(x), rows, rank);
  Tensor y = empty_on(x, x.scalar_type(), rows, out_features);
  // About 2^15 products are worth a thread.
  const auto grain = [&](int64_t products) { return ceil_div(1 << 15, kSmallBlock * (rows * products + 1)); };

  SmallTask down{};
  down.x = tokens.const_data_ptr(), down.weight = a.const_data_ptr();
  down.rows = rows, down.features = features, down.out_features = rank, down.weight_stride = a.stride(0);
  down.factor = factor;
  down.y = s.mutable_data_ptr();
  spread(ceil_div(rank, kSmallBlock), grain(features), [&](int64_t begin, int64_t end) { kernels.small_project(down, begin, end); });

  SmallTask task{};
  task.x = tokens.const_data_ptr(), task.weight = weight.const_data_ptr();
  task.rows = rows, task.features = features, task.out_features = out_features, task.weight_stride = weight.stride(0);
  task.factor = 1.0;
  const Tensor dense_bias = bias ? as_contiguous(*bias) : Tensor();
  if (bias) task.bias = dense_bias.const_data_ptr();
  task.s = s.const_data_ptr(), task.b = b.const_data_ptr(), task.rank = rank, task.b_stride = b.stride(0);
  task.y = y.mutable_data_ptr();
  spread(ceil_div(out_features, kSmallBlock), grain(features + rank),
         [&](int64_t begin, int64_t end) { kernels.small_linear(task, begin, end); });
  return reshaped_like(y, x, out_features);
}

Tensor lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scale, double dropout_p,
                   std::optional<Tensor> seed) {
  return lora_linear_any(x, weight, bias, lora_a, lora_b, scale, std::nullopt, dropout_p, seed);
}

Tensor lora_linear_tensor_scale(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scale,
                                double dropout_p, std::optional<Tensor> seed) {
  return lora_linear_any(x, weight, bias, lora_a, lora_b, 1.0, scale, dropout_p, seed);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight, Tensor lora_a,
                                                                        Tensor lora_b, double scale, std::optional<Tensor> tensor_scale,
                                                                        double dropout_p, Tensor s, Tensor mask, bool need_x,
                                                                        bool need_weight, bool need_bias, bool need_a, bool need_b) {
  const auto& [features, out_features, rank] =
      check_backward(grad, x, weight, lora_a, lora_b, tensor_scale, dropout_p, s, mask, need_weight || need_a);
  const Rows g(grad, out_features);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x, need_weight, need_bias);
  Tensor grad_a, grad_b;
  const int64_t rows = g.rows;
  const bool drops = dropout_p > 0.0;

  const double factor = value_of(scale, tensor_scale) / (1.0 - dropout_p);
  const ScalarType type = lora_a.scalar_type();
  const bool zero = factor == 0.0 || rows == 0;
  if (need_a) grad_a = zero ? zeros_on(lora_a, type, rank, features) : empty_on(lora_a, type, rank, features);
  if (need_b) grad_b = zero ? zeros_on(lora_b, type, out_features, rank) : empty_on(lora_b, type, out_features, rank);
  if (!zero && (need_x || need_a || need_b)) {
    Call call(grad, lora_a);
    const Tensor sums = as_contiguous(s), bits = as_contiguous(mask);
    const Mask kept = drops ? mask_of(bits) : Mask{nullptr, 0};
    const Matrix b = matrix_of(lora_b);
    const std::optional<Tensor> grad_s = call.gradient(g, need_b ? &sums : nullptr, need_b ? &grad_b : nullptr, rank, 1, rank,
                                                       need_x || need_a ? &b : nullptr, factor, Mask{nullptr, 0});
    if (need_a) call.gradient(*tokens, &*grad_s, &grad_a, 1, features, rank, nullptr, 1.0, kept);
    if (need_x) call.expand(grad_x, features, *grad_s, matrix_of(lora_a), kept);
  }
  return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
}

Tensor lora_dropout_mask(Tensor seed, int64_t rows, int64_t cols, double p) {
  check_dropout_mask(seed, rows, cols, p);
  Tensor mask = empty_on(seed, ScalarType::Bool, rows, cols);
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const uint32_t threshold = dropout_threshold(p);
  bool* out = static_cast<bool*>(mask.mutable_data_ptr());
  spread(rows, ceil_div(1 << 14, cols + 1), [&](int64_t begin, int64_t end) {
    uint8_t bytes[kColumnChunk / 8];
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < cols; c += kColumnChunk) {
        const int64_t columns = min_of(kColumnChunk, cols - c);
        level_kernels().dropout_bytes(key, i, c / 8, ceil_div(columns, 8), threshold, bytes);
        for (int64_t j = 0; j < columns; ++j) out[i * cols + c + j] = (bytes[j / 8] >> (j % 8)) & 1;
      }
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear.tensor_scale", TORCH_BOX(&lora_linear_tensor_scale));
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_dropout_mask));
}

}  // namespace peftops::lora
