#include "lora.h"

#include <utility>

#include "../common/call.h"
#include "../common/index.h"

namespace peftops::lora {

void check_dropout(const char* op, double p, const char* name) {
  PEFTOPS_CHECK(p >= 0.0 && p < 1.0, op, ": ", name, " is ", p, ", but must be in [0, 1)");
}

int64_t features_of(const char* op, const Tensor& x) {
  PEFTOPS_CHECK(x.dim() >= 1, op, ": x must be [..., features], but has no dimension");
  return x.size(x.dim() - 1);
}

Problem check_projection(const char* op, const Tensor& x, int64_t x_features, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& lora_a, const Tensor& lora_b, int64_t index) {
  const Named weight_name{index < 0 ? "weight" : "weights", index}, bias_name{index < 0 ? "bias" : "biases", index};
  const Named a_name{"lora_a", index}, b_name{"lora_b", index};
  const ScalarType type = x.scalar_type();
  PEFTOPS_CHECK(is_float(type), op, ": x has dtype ", name_of(type), ", but must be float32, bfloat16, float16 or float64");
  check_dim(op, weight_name, weight, 2, "[out_features, features]");
  check_dim(op, a_name, lora_a, 2, "[rank, features]");
  check_dim(op, b_name, lora_b, 2, "[out_features, rank]");

  const Problem problem{weight.size(1), weight.size(0), lora_a.size(0)};
  const auto& [features, out_features, rank] = problem;
  PEFTOPS_CHECK(features == x_features, op, ": ", weight_name, " has ", features, " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_a.size(1) == x_features, op, ": ", a_name, " has ", lora_a.size(1), " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_b.size(0) == out_features, op, ": ", b_name, " has ", lora_b.size(0), " rows, but ", weight_name, " has ",
                out_features);
  PEFTOPS_CHECK(lora_b.size(1) == rank, op, ": ", b_name, " has ", lora_b.size(1), " columns, but ", a_name, " has ", rank, " rows");

  check_dtype(op, weight_name, weight, type, "x has");
  PEFTOPS_CHECK(lora_b.scalar_type() == lora_a.scalar_type(), op, ": ", b_name, " has dtype ", name_of(lora_b.scalar_type()), ", but ",
                a_name, " has ", name_of(lora_a.scalar_type()));
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  PEFTOPS_CHECK(lora_a.scalar_type() == type || (narrow && lora_a.scalar_type() == ScalarType::Float), op, ": ", a_name, " has dtype ",
                name_of(lora_a.scalar_type()), ", but must have x's, ", name_of(type), narrow ? ", or float32" : "");
  for (const auto& [name, tensor] : {std::pair{weight_name, &weight}, std::pair{a_name, &lora_a}, std::pair{b_name, &lora_b}})
    check_same_device(op, name, *tensor, x);

  if (bias) {
    PEFTOPS_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": ", bias_name, " must have shape [", out_features, "], but has ",
                  shape_of(*bias));
    check_dtype(op, bias_name, *bias, type, "x has");
    check_same_device(op, bias_name, *bias, x);
  }
  return problem;
}

namespace {

void check_seed(const char* op, const Tensor& seed) {
  check_dtype(op, "seed", seed, ScalarType::Long, "it must be");
  PEFTOPS_CHECK(seed.dim() == 1 && seed.size(0) == 1, op, ": seed must have shape [1], but has ", shape_of(seed));
}

// x_features is x's last size; it is given apart, because backward has no x where no gradient needs it.
Problem check_problem(const char* op, const Tensor& x, int64_t x_features, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& tensor_scale, double dropout_p,
                      const std::optional<Tensor>& seed) {
  const Problem problem = check_projection(op, x, x_features, weight, bias, lora_a, lora_b);
  if (tensor_scale) {
    PEFTOPS_CHECK(tensor_scale->dim() == 0, op, ": scale must be a number or have shape [], but has ", shape_of(*tensor_scale));
    check_dtype(op, "scale", *tensor_scale, ScalarType::Float, "it must be");
    check_same_device(op, "scale", *tensor_scale, x);
  }
  check_dropout(op, dropout_p, "dropout_p");
  PEFTOPS_CHECK(dropout_p == 0.0 || seed.has_value(), op, ": dropout_p is ", dropout_p, ", which needs a seed (int64 tensor of shape [1])");
  if (seed) {
    check_seed(op, *seed);
    check_same_device(op, "seed", *seed, x);
  }
  return problem;
}

constexpr const char* kAutocastReason = " (autocast must not reach below the operator)";

}  // namespace

Problem check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                      const std::optional<Tensor>& tensor_scale, double dropout_p, const std::optional<Tensor>& seed) {
  const char* op = "lora_linear";
  return check_problem(op, x, features_of(op, x), weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
}

Problem check_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                       const std::optional<Tensor>& tensor_scale, double dropout_p, const Tensor& s, const Tensor& mask, bool needs_x) {
  const char* op = "lora_linear_backward";
  PEFTOPS_CHECK(x.has_value() || !needs_x, op, ": x is needed for the gradients of weight and lora_a");
  check_dim(op, "weight", weight, 2, "[out_features, features]");
  const std::optional<Tensor> none;
  const Problem problem =
      check_problem(op, x ? *x : grad, x ? features_of(op, *x) : weight.size(1), weight, none, lora_a, lora_b, tensor_scale, 0.0, none);
  const auto& [features, out_features, rank] = problem;
  check_dropout(op, dropout_p, "dropout_p");
  check_dtype(op, "grad", grad, weight.scalar_type(), "weight has");
  PEFTOPS_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == out_features, op, ": grad must be [..., ", out_features,
                "], but has shape ", shape_of(grad));
  const int64_t rows = rows_of(grad);
  PEFTOPS_CHECK(!x || rows_of(*x) == rows, op, ": x has ", x ? rows_of(*x) : 0, " rows, but grad has ", rows);
  PEFTOPS_CHECK(s.dim() == 2 && s.size(0) == rows && s.size(1) == rank && s.scalar_type() == accumulator_of(grad), op,
                ": s must be what lora_linear_forward returned, [", rows, ", ", rank, "], but has shape ", shape_of(s));
  PEFTOPS_CHECK(
      dropout_p == 0.0 ||
          (mask.dim() == 2 && mask.size(0) == rows && mask.size(1) == ceil_div(features, 8) && mask.scalar_type() == ScalarType::Byte),
      op, ": mask must be what lora_linear_forward returned, [", rows, ", ", ceil_div(features, 8), "], but has shape ", shape_of(mask));
  for (const auto& [name, tensor] : {std::pair{"grad", &grad}, std::pair{"s", &s}, std::pair{"mask", &mask}})
    check_same_device(op, name, *tensor, weight);
  return problem;
}

void check_dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p) {
  const char* op = "lora_dropout_mask";
  check_seed(op, seed);
  PEFTOPS_CHECK(rows >= 0, op, ": rows is ", rows, ", but must not be negative");
  PEFTOPS_CHECK(cols >= 0, op, ": cols is ", cols, ", but must not be negative");
  check_dropout(op, p, "p");
}

Tensor base_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor y = as_contiguous(call<1>("aten::linear", x, weight, bias)[0]);
  PEFTOPS_CHECK(y.scalar_type() == x.scalar_type(), "lora_linear: the base product has dtype ", name_of(y.scalar_type()), ", but x has ",
                name_of(x.scalar_type()), kAutocastReason);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> base_gradients(const Rows& grad, const Tensor& weight, const std::optional<Rows>& x, bool need_x,
                                                  bool need_weight, bool need_bias) {
  Tensor grad_x, grad_weight, grad_bias;
  if (need_x) {
    grad_x = call<1>("aten::mm", grad.matrix(), weight)[0];
    PEFTOPS_CHECK(grad_x.scalar_type() == weight.scalar_type(), "lora_linear_backward: the base product has dtype ",
                  name_of(grad_x.scalar_type()), ", but grad has ", name_of(weight.scalar_type()), kAutocastReason);
  }
  if (need_weight) grad_weight = call<1>("aten::mm", torch::stable::transpose(grad.matrix(), 0, 1), x->matrix())[0];
  if (need_bias) {
    const std::array<int64_t, 1> first{0};
    grad_bias = torch::stable::sum(grad.matrix(), Sizes(first.data(), 1));
  }
  return {grad_x, grad_weight, grad_bias};
}

Gradients backward_results(const Tensor& grad, int64_t features, Gradients found) {
  auto& [grad_x, grad_weight, grad_bias, grad_a, grad_b] = found;
  if (grad_x.defined()) grad_x = reshaped_like(grad_x, grad, features);
  // No two results may be the same tensor.
  for (Tensor* result : {&grad_x, &grad_weight, &grad_bias, &grad_a, &grad_b})
    if (!result->defined()) *result = empty_on(grad, grad.scalar_type(), 0);
  return found;
}

}  // namespace peftops::lora
