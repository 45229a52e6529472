// LoRA on the CPU: checks, plan and registration. cpu_call.h has the passes, cpu_kernels.cpp the arithmetic.
#include <torch/csrc/stable/library.h>

#include "../common/philox.h"
#include "cpu_call.h"

namespace peftops::lora {
namespace {

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
  const Kernels& kernels = level_kernels().find(storage_of(x), storage_of(lora_a));
  const bool small = rows <= kSmallRows && dropout_p == 0.0 && factor != 0.0 && (features <= 1 || weight.stride(1) == 1);
  if (!small) return std::get<0>(forward(problem, x, weight, bias, lora_a, lora_b, factor, dropout_p, seed));

  const Tensor pieces = by_piece(as_contiguous(x), rows, features), b = with_unit_stride(lora_b);
  const Tensor s = few_row_sums(pieces, rows, lora_a, factor);
  Tensor y = empty_on(x, x.scalar_type(), rows, out_features);
  SmallTask task{};
  task.x = pieces.const_data_ptr(), task.weight = weight.const_data_ptr();
  task.rows = rows, task.features = features, task.out_features = out_features, task.weight_stride = weight.stride(0);
  task.factor = 1.0;
  const Tensor dense_bias = bias ? as_contiguous(*bias) : Tensor();
  if (bias) task.bias = dense_bias.const_data_ptr();
  task.s = s.const_data_ptr(), task.b = b.const_data_ptr(), task.rank = rank, task.b_stride = b.stride(0);
  task.y = y.mutable_data_ptr();
  spread(ceil_div(out_features, kSmallBlock), small_grain(rows, features + rank),
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

Tensor linear_on_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                     double scale) {
  return lora_linear_any(x, weight, bias, lora_a, lora_b, scale, std::nullopt, 0.0, std::nullopt);
}

STABLE_TORCH_LIBRARY_IMPL(peftops, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear.tensor_scale", TORCH_BOX(&lora_linear_tensor_scale));
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_dropout_mask));
}

}  // namespace peftops::lora
