// Several projections of one x on the CPU: S_j in one read of x, the gradient of x in one pass for all.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/philox.h"
#include "cpu_call.h"
#include "multi.h"

namespace peftops::lora {
namespace {

size_t at(int64_t j) { return static_cast<size_t>(j); }

double scale_of(const Tensor& scales, int64_t j) { return scales.const_data_ptr<float>()[j * scales.stride(0)]; }

// Where the columns of projection j start in a [rows, rank] tensor of accumulators.
void* columns_of(const Tensor& s, const MultiProblem& problem, int64_t j) {
  return static_cast<char*>(s.mutable_data_ptr()) + problem.first_rank[at(j)] * static_cast<int64_t>(s.element_size());
}

Mask mask_of(const Tensor& masks, int64_t j) {
  if (masks.dim() != 3) return {nullptr, 0};
  return {static_cast<uint8_t*>(masks.data_ptr()) + j * masks.size(1) * masks.size(2), masks.size(2)};
}

std::tuple<Tensors, Tensor, Tensor> forward(const MultiProblem& problem, const Tensor& x, const Tensors& weights,
                                            const OptionalTensors& biases, const Tensors& lora_a, const Tensors& lora_b,
                                            const Tensor& scales, double dropout_p, const std::optional<Tensor>& seeds) {
  const int64_t rows = rows_of(x), count = problem.count();
  const bool drops = dropout_p > 0.0;
  Tensors ys;
  std::vector<int64_t> active;  // a scale of 0 takes the base linear's path and nothing else
  for (int64_t j = 0; j < count; ++j) {
    ys.push_back(base_product(x, weights[at(j)], biases[at(j)]));
    if (scale_of(scales, j) != 0.0) active.push_back(j);
  }
  const auto results = [&](ScalarType type, auto... sizes) {
    return static_cast<int64_t>(active.size()) == count ? empty_on(x, type, sizes...) : zeros_on(x, type, sizes...);
  };
  const Tensor s = results(accumulator_of(x), rows, problem.rank);
  const Tensor masks = drops ? results(ScalarType::Byte, count, rows, ceil_div(problem.features, 8)) : empty_on(x, ScalarType::Byte, 0);
  if (active.empty()) return {ys, s, masks};

  Call call(x, lora_a[0]);
  std::vector<Projection> projections;
  for (const int64_t j : active)
    projections.push_back({lora_a[at(j)], scale_of(scales, j) / (1.0 - dropout_p),
                           drops ? static_cast<uint64_t>(seeds->const_data_ptr<int64_t>()[j * seeds->stride(0)]) : 0, mask_of(masks, j),
                           columns_of(s, problem, j)});
  call.project(Rows(x, problem.features), projections, problem.rank, drops, dropout_threshold(dropout_p));
  for (const int64_t j : active)
    call.expand(ys[at(j)], rows, problem.out_features[at(j)],
                {{columns_of(s, problem, j), problem.rank, transposed(matrix_of(lora_b[at(j)])), Mask{nullptr, 0}}});
  return {ys, s, masks};
}

std::tuple<Tensors, Tensor, Tensor> lora_linear_multi_forward(Tensor x, Tensors weights, OptionalTensors biases, Tensors lora_a,
                                                              Tensors lora_b, Tensor scales, double dropout_p,
                                                              std::optional<Tensor> seeds) {
  const MultiProblem problem = check_multi_forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
  return forward(problem, x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
}

Tensors lora_linear_multi(Tensor x, Tensors weights, OptionalTensors biases, Tensors lora_a, Tensors lora_b, Tensor scales,
                          double dropout_p, std::optional<Tensor> seeds) {
  const MultiProblem problem = check_multi_forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
  if (rows_of(x) > kSmallRows || dropout_p > 0.0)
    return std::get<0>(forward(problem, x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds));
  // Few rows: each weight is read once by the kernel that makes the whole of y_j, and x is small.
  Tensors ys;
  for (int64_t j = 0; j < problem.count(); ++j)
    ys.push_back(linear_on_cpu(x, weights[at(j)], biases[at(j)], lora_a[at(j)], lora_b[at(j)], scale_of(scales, j)));
  return ys;
}

// Gradient of x without the adapters, summed by the vendor's GEMM, and of weights and biases.
Tensor base_parts(const MultiProblem& problem, const std::vector<std::optional<Rows>>& grads, const std::optional<Rows>& x,
                  const Tensors& weights, bool need_x, const std::vector<bool>& need_weight, const std::vector<bool>& need_bias,
                  Tensors& grad_weights, Tensors& grad_biases) {
  Tensor sum;
  for (int64_t j = 0; j < problem.count(); ++j) {
    const auto& grad = grads[at(j)];
    if (!grad) continue;
    Tensor grad_x;
    std::tie(grad_x, grad_weights[at(j)], grad_biases[at(j)]) =
        base_gradients(*grad, weights[at(j)], x, need_x && !sum.defined(), need_weight[at(j)], need_bias[at(j)]);
    if (grad_x.defined())
      sum = grad_x;
    else if (need_x)
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), grad->matrix().get(), weights[at(j)].get(), 1.0, 1.0));
  }
  return sum;
}

MultiGradients lora_linear_multi_backward(OptionalTensors grads, std::optional<Tensor> x, Tensors weights, Tensors lora_a, Tensors lora_b,
                                          Tensor scales, double dropout_p, Tensor s, Tensor masks, bool need_x,
                                          std::vector<bool> need_weight, std::vector<bool> need_bias, std::vector<bool> need_a,
                                          std::vector<bool> need_b) {
  const MultiProblem problem =
      check_multi_backward(grads, x, weights, lora_a, lora_b, scales, dropout_p, s, masks, need_weight, need_bias, need_a, need_b);
  const int64_t rows = s.size(0), features = problem.features;
  std::vector<std::optional<Rows>> g(grads.size());
  for (int64_t j = 0; j < problem.count(); ++j)
    if (grads[at(j)]) g[at(j)].emplace(*grads[at(j)], problem.out_features[at(j)]);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  Tensors grad_weights(grads.size()), grad_biases(grads.size()), grad_a(grads.size()), grad_b(grads.size());
  const Tensor grad_x = base_parts(problem, g, tokens, weights, need_x, need_weight, need_bias, grad_weights, grad_biases);

  const Tensor sums = as_contiguous(s), bits = as_contiguous(masks);
  const Tensor grad_s = empty_on(sums, sums.scalar_type(), rows, problem.rank);
  const Mask no_mask{nullptr, 0};
  Call call(weights[0], lora_a[0]);
  std::vector<FactorGradient> factor_gradients;
  std::vector<Product> products;
  for (int64_t j = 0; j < problem.count(); ++j) {
    if (!g[at(j)]) continue;
    const Tensor &a = lora_a[at(j)], &b = lora_b[at(j)];
    const int64_t rank = problem.ranks[at(j)], out_features = problem.out_features[at(j)];
    const double factor = scale_of(scales, j) / (1.0 - dropout_p);
    const bool zero = factor == 0.0 || rows == 0;
    const auto result = [&](auto... sizes) {
      return zero ? zeros_on(a, a.scalar_type(), sizes...) : empty_on(a, a.scalar_type(), sizes...);
    };
    if (need_a[at(j)]) grad_a[at(j)] = result(rank, features);
    if (need_b[at(j)]) grad_b[at(j)] = result(out_features, rank);
    const bool need_s = need_x || need_a[at(j)];
    if (zero || !(need_s || need_b[at(j)])) continue;

    std::vector<FactorGradient> of_b;
    if (need_b[at(j)])
      of_b.push_back({{columns_of(sums, problem, j), rows, rank, problem.rank, 1}, no_mask, grad_b[at(j)].mutable_data_ptr(), rank, 1});
    const Matrix factor_b = matrix_of(b);
    void* to = columns_of(grad_s, problem, j);
    call.gradient(*g[at(j)], of_b, need_s ? &factor_b : nullptr, factor, to, problem.rank);
    const Mask kept = dropout_p > 0.0 ? mask_of(bits, j) : no_mask;
    if (need_a[at(j)]) factor_gradients.push_back({{to, rows, rank, problem.rank, 1}, kept, grad_a[at(j)].mutable_data_ptr(), 1, features});
    if (need_x) products.push_back({to, problem.rank, matrix_of(a), kept});
  }
  if (!factor_gradients.empty()) call.gradient(*tokens, factor_gradients, nullptr, 1.0, nullptr, 0);
  if (!products.empty()) call.expand(grad_x, rows, features, products);
  const auto first = std::find_if(grads.begin(), grads.end(), [](const auto& grad) { return grad.has_value(); });
  return multi_backward_results(**first, features, {grad_x, grad_weights, grad_biases, grad_a, grad_b});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CPU, m) {
  m.impl("lora_linear_multi", TORCH_BOX(&lora_linear_multi));
  m.impl("lora_linear_multi_forward", TORCH_BOX(&lora_linear_multi_forward));
  m.impl("lora_linear_multi_backward", TORCH_BOX(&lora_linear_multi_backward));
}

}  // namespace peftops::lora
