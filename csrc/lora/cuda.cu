// LoRA on CUDA: checks and registration. cuda_call.h has the buffers, plans and launches, sm80.cuh the device code.
#include <torch/csrc/stable/library.h>

#include "../common/philox.h"
#include "cuda_call.h"

namespace peftops::lora {
namespace {

struct Forward {
  Tensor y, s, mask;
};

Forward forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                double scale_, const std::optional<Tensor>& tensor_scale, double dropout_p, const std::optional<Tensor>& seed, bool saves) {
  const Problem problem = check_forward(x, weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  check_cuda_dtype("lora_linear", x);
  const auto& [features, out_features, rank] = problem;
  const int64_t rows = rows_of(x);
  const bool drops = dropout_p > 0.0;
  const Scale scale = scale_of(scale_, tensor_scale, dropout_p);
  if (is_off(scale) || rows == 0 || (rank == 0 && !drops) || (out_features == 0 && !saves))
    return {base_product(x, weight, bias), zeros_on(x, ScalarType::Float, rows, rank),
            drops ? zeros_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0)};

  Call call("lora_linear", x, lora_a);
  Tensor mask = drops ? empty_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0);
  const Draw draw{drops ? seed->const_data_ptr<int64_t>() : nullptr, dropout_threshold(dropout_p)};
  const Rows tokens(x, features);
  const Sums sums = call.project(tokens, lora_a, rank, false, scale, drops ? &draw : nullptr, bits_of(mask));
  const bool whole = sums.splits == 1 && sums.stride == rank;
  if (rank == 0 || out_features == 0) {
    Tensor s = call.added(sums);
    return {base_product(x, weight, bias), whole ? s : torch::stable::contiguous(torch::stable::narrow(s, 1, 0, rank)), mask};
  }
  Tensor s = whole || !saves ? sums.values : empty_on(x, ScalarType::Float, rows, rank);
  float* const sum = whole || !saves ? nullptr : static_cast<float*>(s.mutable_data_ptr());
  const bool aligned = in_whole_chunks(tokens) && in_whole_chunks(weight) && in_whole_chunks(lora_b);
  const Linear how = call.choose(rows, out_features, features, rank, false, aligned);
  if (how == Linear::vendor) {
    const Tensor y = base_product(x, weight, bias);
    call.expand(y, out_features, sums, lora_b, rank, false, scale, MaskBits{}, sum, rank);
    return {y, s, mask};
  }
  const Tensor y = empty_on(x, x.scalar_type(), rows, out_features);
  call.gemm(how, y, out_features, tokens, weight, bias, sums, lora_b, rank, false, scale, MaskBits{}, sum, rank);
  return {reshaped_like(y, x, out_features), s, mask};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       double scale, std::optional<Tensor> tensor_scale, double dropout_p,
                                                       std::optional<Tensor> seed) {
  const Forward result = forward(x, weight, bias, lora_a, lora_b, scale, tensor_scale, dropout_p, seed, true);
  return {result.y, result.s, result.mask};
}

Tensor lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scale, double dropout_p,
                   std::optional<Tensor> seed) {
  return forward(x, weight, bias, lora_a, lora_b, scale, std::nullopt, dropout_p, seed, false).y;
}

Tensor lora_linear_tensor_scale(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scale,
                                double dropout_p, std::optional<Tensor> seed) {
  return forward(x, weight, bias, lora_a, lora_b, 1.0, scale, dropout_p, seed, false).y;
}

Gradients lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight, Tensor lora_a, Tensor lora_b, double scale_,
                               std::optional<Tensor> tensor_scale, double dropout_p, Tensor s, Tensor mask, bool need_x, bool need_weight,
                               bool need_bias, bool need_a, bool need_b) {
  const auto& [features, out_features, rank] =
      check_backward(grad, x, weight, lora_a, lora_b, tensor_scale, dropout_p, s, mask, need_weight || need_a);
  check_cuda_dtype("lora_linear_backward", grad);
  const Rows g(grad, out_features);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  const ScalarType type = lora_a.scalar_type();
  const Scale scale = scale_of(scale_, tensor_scale, dropout_p);
  const int64_t rows = g.rows;
  Tensor grad_a, grad_b;
  if (is_off(scale) || rows == 0 || rank == 0) {
    const auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x, need_weight, need_bias);
    if (need_a) grad_a = zeros_on(lora_a, type, rank, features);
    if (need_b) grad_b = zeros_on(lora_b, type, out_features, rank);
    return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
  }
  Call call("lora_linear_backward", grad, lora_a);
  const bool aligned = in_whole_chunks(g) && in_whole_chunks(weight) && in_whole_chunks(lora_a);
  const Linear how = need_x && features > 0 ? call.choose(rows, features, out_features, rank, true, aligned) : Linear::vendor;
  const bool vendor = how == Linear::vendor;
  auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x && vendor, need_weight, need_bias);
  const Tensor bits = as_contiguous(mask);
  const MaskBits kept = dropout_p > 0.0 ? bits_of(bits) : MaskBits{};
  const Rows saved = padded(Rows(s, rank));
  if (need_b) {
    grad_b = empty_on(lora_b, type, out_features, rank);
    call.gradient(g, static_cast<const float*>(saved.data()), saved.stride, grad_b, rank, false, scale, MaskBits{});
  }
  if (need_x || need_a) {
    const Sums sums = call.project(g, lora_b, rank, true, scale, nullptr, MaskBits{});
    Tensor grad_s = sums.values;
    if (need_x) {
      // What reads the splits adds them for the gradient of lora_a as well.
      const bool adds = need_a && sums.splits > 1;
      if (adds) grad_s = empty_on(grad, ScalarType::Float, rows, sums.stride);
      float* const sum = adds ? static_cast<float*>(grad_s.mutable_data_ptr()) : nullptr;
      if (vendor) {
        call.expand(grad_x, features, sums, lora_a, rank, true, scale, kept, sum, sums.stride);
      } else {
        grad_x = empty_on(grad, grad.scalar_type(), rows, features);
        call.gemm(how, grad_x, features, g, weight, std::nullopt, sums, lora_a, rank, true, scale, kept, sum, sums.stride);
      }
    } else {
      grad_s = call.added(sums);
    }
    if (need_a) {
      grad_a = empty_on(lora_a, type, rank, features);
      call.gradient(*tokens, grad_s.const_data_ptr<float>(), sums.stride, grad_a, rank, true, scale, kept);
    }
  }
  call.finish();
  return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
}

Tensor lora_dropout_mask(Tensor seed, int64_t rows, int64_t cols, double p) {
  check_dropout_mask(seed, rows, cols, p);
  Tensor mask = empty_on(seed, ScalarType::Bool, rows, cols);
  if (rows == 0 || cols == 0) return mask;
  const Launcher launch("lora_dropout_mask", seed);
  const int64_t count = checked_product(rows, ceil_div(cols, 8), "lora_dropout_mask");
  const DropoutMaskTask task{seed.const_data_ptr<int64_t>(), rows, cols, dropout_threshold(p), static_cast<bool*>(mask.mutable_data_ptr())};
  launch(dropout_mask_kernel(), {min_of(ceil_div(count, kThreads), std::numeric_limits<int32_t>::max())}, kThreads, 0, task);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear.tensor_scale", TORCH_BOX(&lora_linear_tensor_scale));
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_dropout_mask));
}

}  // namespace peftops::lora
