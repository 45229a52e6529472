// LoRA on the CPU: checks, plan, buffers and registration. The arithmetic is in cpu_kernels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/call.h"
#include "../common/index.h"
#include "../common/philox.h"
#include "cpu_kernels.h"
#include "lora.h"
#include "plan.h"

namespace peftops::lora {
namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

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

ScalarType accumulator_of(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

template <class... Size>
Tensor empty_on(const Tensor& like, ScalarType type, Size... sizes) {
  const std::array<int64_t, sizeof...(sizes)> shape{sizes...};
  return torch::stable::new_empty(like, Sizes(shape.data(), shape.size()), type);
}

template <class... Size>
Tensor zeros_on(const Tensor& like, ScalarType type, Size... sizes) {
  const std::array<int64_t, sizeof...(sizes)> shape{sizes...};
  return torch::stable::new_zeros(like, Sizes(shape.data(), shape.size()), type);
}

int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

// [..., columns] as a matrix whose rows are contiguous; a copy only where the strides leave no other way.
Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> shape{rows, columns};
  Tensor matrix = torch::stable::reshape(t, Sizes(shape.data(), shape.size()));
  return columns <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

// A matrix whose rows are contiguous.
Tensor with_unit_stride(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

// The shape of `like` with another last dimension.
Tensor reshaped_like(const Tensor& t, const Tensor& like, int64_t columns) {
  std::vector<int64_t> shape(static_cast<size_t>(like.dim()));
  for (int64_t d = 0; d + 1 < like.dim(); ++d) shape[static_cast<size_t>(d)] = like.size(d);
  shape.back() = columns;
  return torch::stable::view(t, Sizes(shape.data(), shape.size()));
}

double value_of(double scale, const std::optional<Tensor>& tensor_scale) {
  return tensor_scale ? scale * *tensor_scale->const_data_ptr<float>() : scale;
}

// A 2-D tensor with its rows along the contraction, and with its columns there.
Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }
Matrix transposed(const Matrix& m) { return {m.data, m.lanes, m.contraction, m.lane_stride, m.stride}; }

// Runs body(begin, end) over the tasks on torch's threads, `grain` tasks or more on each.
template <class Body>
void spread(int64_t tasks, int64_t grain, const Body& body) { torch::stable::parallel_for(0, tasks, grain < 1 ? 1 : grain, body); }

// One call's kernels and scratch; scratch comes from torch's allocator and lives as long as the call.
class Call {
 public:
  Call(const Tensor& x, const Tensor& lora_a) : kernels(level_kernels().find(storage_of(x), storage_of(lora_a))), like_(x) {}

  const Kernels& kernels;

  int64_t padded(int64_t n) const { return round_up(n, kernels.lanes); }

  Packed scratch(int64_t rows, int64_t stride) {
    buffers_.push_back(empty_on(like_, ScalarType::Byte, checked_product(checked_product(rows, stride, "scratch"), kernels.element, "scratch")));
    return {buffers_.back().mutable_data_ptr(), stride};
  }

  Packed pack(const Matrix& factor) {
    const Packed packed = scratch(ceil_div(factor.contraction, kernels.step), padded(factor.lanes));
    spread(ceil_div(factor.contraction, kernels.step), ceil_div(1 << 13, factor.lanes + 1),
           [&](int64_t begin, int64_t end) { kernels.pack_factor(factor, packed, begin, end); });
    return packed;
  }

  // S = factor * keep(x) A^T, drawing the mask where `draw` says so.
  Tensor project(const Tensor& x, const Tensor& lora_a, double factor, bool draw, uint64_t seed, uint32_t threshold, Mask mask) {
    const int64_t rows = x.size(0), features = x.size(1), rank = lora_a.size(0);
    Tensor s = empty_on(x, accumulator_of(x), rows, rank);
    const ProjectTask task{x.const_data_ptr(), rows, features, x.stride(0), rank, pack(transposed(matrix_of(lora_a))), factor, draw,
                           seed, threshold, mask, s.mutable_data_ptr()};
    spread(ceil_div(rows, kRowBlock), 1, [&](int64_t begin, int64_t end) { kernels.project(task, begin, end); });
    return s;
  }

  // Y += keep(S B), with B as [rank, features].
  void expand(Tensor& y, const Tensor& s, const Matrix& b, Mask mask) {
    const int64_t rows = y.size(0), features = y.size(1);
    const Packed elements = scratch(rows, ceil_div(b.contraction, kernels.step));
    kernels.pack_ranks(s.const_data_ptr(), rows, b.contraction, elements);
    const ExpandTask task{y.mutable_data_ptr(), rows, features, y.stride(0), elements.data, elements.stride, pack(b), mask};
    const int64_t tasks = ceil_div(rows, kRowBlock) * ceil_div(features, kExpandColumns);
    spread(tasks, 1, [&](int64_t begin, int64_t end) { kernels.expand(task, begin, end); });
  }

  // gradient = keep(G)^T S into a [features, rank] view, and, where B is given, factor * G B in the same pass.
  std::optional<Tensor> gradient(const Tensor& g, const Tensor* s, Tensor* gradient, int64_t feature_stride, int64_t rank_stride, int64_t rank,
                                 const Matrix* b, double factor, Mask mask) {
    const int64_t rows = g.size(0), features = g.size(1), panel = gradient_panel(features), panels = ceil_div(features, panel);
    const int64_t padded_rows = round_up(rows, kRowBlock), padded_rank = padded(rank);
    GradientTask task{};
    task.g = g.const_data_ptr();
    task.rows = rows, task.features = features, task.g_stride = g.stride(0), task.rank = rank, task.panel = panel, task.mask = mask;
    if (gradient) {
      task.s = scratch(ceil_div(rows, kernels.step), padded_rank);
      kernels.pack_sums(matrix_of(*s), task.s, 0, ceil_div(rows, kernels.step));
      task.gradient = gradient->mutable_data_ptr();
      task.gradient_feature_stride = feature_stride, task.gradient_rank_stride = rank_stride;
    }
    Tensor partials;
    if (b) {
      task.b = pack(*b);
      partials = empty_on(g, accumulator_of(g), panels, padded_rows, padded_rank);
      task.partials = partials.mutable_data_ptr();
    }
    spread(panels, 1, [&](int64_t begin, int64_t end) { kernels.gradient(task, begin, end); });
    if (!b) return std::nullopt;
    Tensor sum = empty_on(g, accumulator_of(g), rows, rank);
    spread(rows, 64, [&](int64_t begin, int64_t end) {
      kernels.reduce(partials.const_data_ptr(), panels, padded_rows * padded_rank, padded_rank, rank, factor, sum.mutable_data_ptr(), begin, end);
    });
    return sum;
  }

 private:
  Tensor like_;
  std::vector<Tensor> buffers_;
};

Mask mask_of(const Tensor& mask) { return mask.dim() == 2 ? Mask{static_cast<uint8_t*>(mask.data_ptr()), mask.size(1)} : Mask{nullptr, 0}; }

// Y = x W^T + bias by the vendor's GEMM, and beside it S and the mask where there is an adapter.
std::tuple<Tensor, Tensor, Tensor> forward(const Problem& problem, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& lora_a, const Tensor& lora_b, double scale, double dropout_p,
                                           const std::optional<Tensor>& seed) {
  const auto& [features, out_features, rank] = problem;
  const int64_t rows = rows_of(x);
  Tensor y = torch::stable::contiguous(call<1>("aten::linear", x, weight, bias)[0]);
  const bool drops = dropout_p > 0.0;
  if (scale == 0.0)
    return {y, zeros_on(x, accumulator_of(x), rows, rank),
            drops ? zeros_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0)};
  Tensor mask = drops ? empty_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0);
  Call call(x, lora_a);
  const uint64_t key = drops ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0;
  const Tensor s = call.project(as_matrix(x, rows, features), lora_a, scale / (1.0 - dropout_p), drops, key, dropout_threshold(dropout_p), mask_of(mask));
  Tensor matrix = as_matrix(y, rows, out_features);
  call.expand(matrix, s, transposed(matrix_of(lora_b)), Mask{nullptr, 0});
  return {y, s, mask};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       double scale, std::optional<Tensor> tensor_scale, double dropout_p,
                                                       std::optional<Tensor> seed) {
  const Problem problem = check_problem("lora_linear_forward", x, last_size("lora_linear_forward", "x", x), weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  return forward(problem, x, weight, bias, lora_a, lora_b, value_of(scale, tensor_scale), dropout_p, seed);
}

Tensor lora_linear_inference(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scale,
                             std::optional<Tensor> tensor_scale, double dropout_p, std::optional<Tensor> seed) {
  const Problem problem = check_problem("lora_linear_inference", x, last_size("lora_linear_inference", "x", x), weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  const auto& [features, out_features, rank] = problem;
  const double factor = value_of(scale, tensor_scale);
  const int64_t rows = rows_of(x);
  const bool small = rows <= kSmallRows && dropout_p == 0.0 && factor != 0.0 && (features <= 1 || weight.stride(1) == 1);
  if (!small) return std::get<0>(forward(problem, x, weight, bias, lora_a, lora_b, factor, dropout_p, seed));

  const Kernels& kernels = level_kernels().find(storage_of(x), storage_of(lora_a));
  const Tensor tokens = torch::stable::contiguous(as_matrix(x, rows, features));
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
  const Tensor dense_bias = bias ? torch::stable::contiguous(*bias) : Tensor();
  if (bias) task.bias = dense_bias.const_data_ptr();
  task.s = s.const_data_ptr(), task.b = b.const_data_ptr(), task.rank = rank, task.b_stride = b.stride(0);
  task.y = y.mutable_data_ptr();
  spread(ceil_div(out_features, kSmallBlock), grain(features + rank), [&](int64_t begin, int64_t end) { kernels.small_linear(task, begin, end); });
  return reshaped_like(y, x, out_features);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight, Tensor lora_a,
                                                                        Tensor lora_b, double scale, std::optional<Tensor> tensor_scale,
                                                                        double dropout_p, Tensor s, Tensor mask, bool need_x, bool need_weight,
                                                                        bool need_bias, bool need_a, bool need_b) {
  const char* op = "lora_linear_backward";
  check(x.has_value() || !(need_weight || need_a), op, ": x is needed for the gradients of weight and lora_a");
  check_dim(op, "weight", weight, 2, "[out_features, features]");
  const int64_t x_features = x ? last_size(op, "x", *x) : weight.size(1);
  const Problem problem =
      check_problem(op, x ? *x : grad, x_features, weight, std::nullopt, lora_a, lora_b, tensor_scale, 0.0, std::nullopt);
  const auto& [features, out_features, rank] = problem;
  check_dropout(op, dropout_p, "dropout_p");
  check_dtype(op, "grad", grad, weight.scalar_type(), "weight has");
  check(grad.dim() >= 1 && grad.size(grad.dim() - 1) == out_features, op, ": grad must be [..., ", out_features, "], but has shape ", shape_of(grad));
  const int64_t rows = rows_of(grad);
  check(!x || rows_of(*x) == rows, op, ": x has ", x ? rows_of(*x) : 0, " rows, but grad has ", rows);
  check(s.dim() == 2 && s.size(0) == rows && s.size(1) == rank && s.is_contiguous() && s.scalar_type() == accumulator_of(grad), op,
        ": s must be what lora_linear_forward returned, [", rows, ", ", rank, "], but has shape ", shape_of(s));
  const bool drops = dropout_p > 0.0;
  check(!drops || (mask.dim() == 2 && mask.size(0) == rows && mask.size(1) == ceil_div(features, 8) && mask.is_contiguous() &&
                   mask.scalar_type() == ScalarType::Byte),
        op, ": mask must be what lora_linear_forward returned, [", rows, ", ", ceil_div(features, 8), "], but has shape ", shape_of(mask));

  const Tensor none = empty_on(grad, grad.scalar_type(), 0);
  Tensor grad_x = none, grad_weight = none, grad_bias = none, grad_a = none, grad_b = none;
  const Tensor g = as_matrix(grad, rows, out_features);
  const Tensor x_matrix = x ? as_matrix(*x, rows, features) : none;
  if (need_x) grad_x = torch::stable::matmul(g, weight);
  if (need_weight) grad_weight = torch::stable::matmul(torch::stable::transpose(g, 0, 1), x_matrix);
  if (need_bias) {
    const std::array<int64_t, 1> first{0};
    grad_bias = torch::stable::sum(g, Sizes(first.data(), 1));
  }

  const double factor = value_of(scale, tensor_scale) / (1.0 - dropout_p);
  const ScalarType type = lora_a.scalar_type();
  const bool zero = factor == 0.0 || rows == 0;
  if (need_a) grad_a = zero ? zeros_on(lora_a, type, rank, features) : empty_on(lora_a, type, rank, features);
  if (need_b) grad_b = zero ? zeros_on(lora_b, type, out_features, rank) : empty_on(lora_b, type, out_features, rank);
  if (!zero && (need_x || need_a || need_b)) {
    Call call(grad, lora_a);
    const Mask kept = drops ? mask_of(mask) : Mask{nullptr, 0};
    const Matrix b = matrix_of(lora_b);
    const std::optional<Tensor> grad_s = call.gradient(g, need_b ? &s : nullptr, need_b ? &grad_b : nullptr, rank, 1, rank,
                                                       need_x || need_a ? &b : nullptr, factor, Mask{nullptr, 0});
    if (need_a) call.gradient(x_matrix, &*grad_s, &grad_a, 1, features, rank, nullptr, 1.0, kept);
    if (need_x) call.expand(grad_x, *grad_s, matrix_of(lora_a), kept);
  }
  if (need_x) grad_x = reshaped_like(grad_x, grad, features);
  return {grad_x, grad_weight, grad_bias, grad_a, grad_b};
}

Tensor lora_dropout_mask(Tensor seed, int64_t rows, int64_t cols, double p) {
  const char* op = "lora_dropout_mask";
  check_seed(op, seed);
  check(rows >= 0, op, ": rows is ", rows, ", but must not be negative");
  check(cols >= 0, op, ": cols is ", cols, ", but must not be negative");
  check_dropout(op, p, "p");
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
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear_forward));
  m.impl("lora_linear_inference", TORCH_BOX(&lora_linear_inference));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_dropout_mask));
}

}  // namespace peftops::lora
