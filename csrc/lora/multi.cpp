#include "multi.h"

#include "../common/index.h"

namespace peftops::lora {
namespace {

template <class List>
void check_count(const char* op, const char* name, const List& list, size_t count) {
  PEFTOPS_CHECK(list.size() == count, op, ": ", name, " has ", list.size(), " elements, but weights has ", count);
}

// One number per projection.
void check_vector(const char* op, const char* name, const Tensor& t, int64_t count, ScalarType type, const Tensor& x) {
  PEFTOPS_CHECK(t.dim() == 1 && t.size(0) == count, op, ": ", name, " must have shape [", count, "], but has ", shape_of(t));
  check_dtype(op, name, t, type, "it must be");
  check_same_device(op, name, t, x);
}

MultiProblem check_projections(const char* op, const Tensor& x, int64_t x_features, const Tensors& weights, const OptionalTensors* biases,
                               const Tensors& lora_a, const Tensors& lora_b, const Tensor& scales, double dropout_p) {
  PEFTOPS_CHECK(!weights.empty(), op, ": weights is empty, but must hold one weight for each projection");
  if (biases) check_count(op, "biases", *biases, weights.size());
  check_count(op, "lora_a", lora_a, weights.size());
  check_count(op, "lora_b", lora_b, weights.size());
  MultiProblem problem{x_features, {}, {}, {}, 0};
  const std::optional<Tensor> none;
  for (size_t j = 0; j < weights.size(); ++j) {
    const auto [features, out_features, rank] =
        check_projection(op, x, x_features, weights[j], biases ? (*biases)[j] : none, lora_a[j], lora_b[j], static_cast<int64_t>(j));
    PEFTOPS_CHECK(lora_a[j].scalar_type() == lora_a[0].scalar_type(), op, ": lora_a[", j, "] has dtype ", name_of(lora_a[j].scalar_type()),
                  ", but lora_a[0] has ", name_of(lora_a[0].scalar_type()));
    problem.out_features.push_back(out_features);
    problem.ranks.push_back(rank);
    problem.first_rank.push_back(problem.rank);
    problem.rank += rank;
  }
  check_vector(op, "scales", scales, problem.count(), ScalarType::Float, x);
  check_dropout(op, dropout_p, "dropout_p");
  return problem;
}

}  // namespace

MultiProblem check_multi_forward(const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const Tensors& lora_a,
                                 const Tensors& lora_b, const Tensor& scales, double dropout_p, const std::optional<Tensor>& seeds) {
  const char* op = "lora_linear_multi";
  MultiProblem problem = check_projections(op, x, features_of(op, x), weights, &biases, lora_a, lora_b, scales, dropout_p);
  PEFTOPS_CHECK(dropout_p == 0.0 || seeds.has_value(), op, ": dropout_p is ", dropout_p,
                ", which needs seeds (int64 tensor, one for each projection)");
  if (seeds) check_vector(op, "seeds", *seeds, problem.count(), ScalarType::Long, x);
  return problem;
}

MultiProblem check_multi_backward(const OptionalTensors& grads, const std::optional<Tensor>& x, const Tensors& weights,
                                  const Tensors& lora_a, const Tensors& lora_b, const Tensor& scales, double dropout_p, const Tensor& s,
                                  const Tensor& masks, const std::vector<bool>& need_weight, const std::vector<bool>& need_bias,
                                  const std::vector<bool>& need_a, const std::vector<bool>& need_b) {
  const char* op = "lora_linear_multi_backward";
  check_count(op, "grads", grads, weights.size());
  const Tensor* first = nullptr;
  for (const auto& grad : grads)
    if (grad && !first) first = &*grad;
  PEFTOPS_CHECK(first, op, ": grads holds no tensor, but at least one result must have a gradient");
  check_dim(op, Named{"weights", 0}, weights[0], 2, "[out_features, features]");
  MultiProblem problem = check_projections(op, x ? *x : *first, x ? features_of(op, *x) : weights[0].size(1), weights, nullptr, lora_a,
                                           lora_b, scales, dropout_p);
  for (const auto& [name, needs] : {std::pair{"need_weight", &need_weight}, std::pair{"need_bias", &need_bias},
                                    std::pair{"need_a", &need_a}, std::pair{"need_b", &need_b}})
    check_count(op, name, *needs, weights.size());

  const int64_t rows = s.dim() == 2 ? s.size(0) : 0;
  PEFTOPS_CHECK(s.dim() == 2 && s.size(1) == problem.rank && s.scalar_type() == accumulator_of(weights[0]), op,
                ": s must be what lora_linear_multi_forward returned, [rows, ", problem.rank, "], but has shape ", shape_of(s));
  for (size_t j = 0; j < weights.size(); ++j) {
    PEFTOPS_CHECK(x.has_value() || !(need_weight[j] || need_a[j]), op, ": x is needed for the gradients of weights and lora_a");
    if (!grads[j]) continue;
    const Named name{"grads", static_cast<int64_t>(j)};
    const Tensor& grad = *grads[j];
    check_dtype(op, name, grad, weights[j].scalar_type(), "weights have");
    PEFTOPS_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == problem.out_features[j], op, ": ", name, " must be [..., ",
                  problem.out_features[j], "], but has shape ", shape_of(grad));
    PEFTOPS_CHECK(rows_of(grad) == rows, op, ": ", name, " has ", rows_of(grad), " rows, but s has ", rows);
    check_same_device(op, name, grad, weights[j]);
  }
  PEFTOPS_CHECK(!x || rows_of(*x) == rows, op, ": x has ", x ? rows_of(*x) : 0, " rows, but s has ", rows);
  const int64_t bytes = ceil_div(problem.features, 8);
  PEFTOPS_CHECK(dropout_p == 0.0 || (masks.dim() == 3 && masks.size(0) == problem.count() && masks.size(1) == rows &&
                                     masks.size(2) == bytes && masks.scalar_type() == ScalarType::Byte),
                op, ": masks must be what lora_linear_multi_forward returned, [", problem.count(), ", ", rows, ", ", bytes,
                "], but has shape ", shape_of(masks));
  check_same_device(op, "s", s, weights[0]);
  check_same_device(op, "masks", masks, weights[0]);
  return problem;
}

MultiGradients multi_backward_results(const Tensor& grad, int64_t features, MultiGradients found) {
  auto& [grad_x, grad_weights, grad_biases, grad_a, grad_b] = found;
  grad_x = grad_x.defined() ? reshaped_like(grad_x, grad, features) : empty_on(grad, grad.scalar_type(), 0);
  // No two results may be the same tensor.
  for (Tensors* results : {&grad_weights, &grad_biases, &grad_a, &grad_b})
    for (Tensor& result : *results)
      if (!result.defined()) result = empty_on(grad, grad.scalar_type(), 0);
  return found;
}

}  // namespace peftops::lora
