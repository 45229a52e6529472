#include "lora.h"

#include <utility>

namespace peftops::lora {

void check_dropout(const char* op, double p, const char* name) {
  PEFTOPS_CHECK(p >= 0.0 && p < 1.0, op, ": ", name, " is ", p, ", but must be in [0, 1)");
}

void check_seed(const char* op, const Tensor& seed) {
  check_dtype(op, "seed", seed, ScalarType::Long, "it must be");
  PEFTOPS_CHECK(seed.dim() == 1 && seed.size(0) == 1, op, ": seed must have shape [1], but has ", shape_of(seed));
}

Problem check_problem(const char* op, const Tensor& x, int64_t x_features, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& tensor_scale, double dropout_p,
                      const std::optional<Tensor>& seed) {
  const ScalarType type = x.scalar_type();
  PEFTOPS_CHECK(is_float(type), op, ": x has dtype ", name_of(type), ", but must be float32, bfloat16, float16 or float64");
  check_dim(op, "weight", weight, 2, "[out_features, features]");
  check_dim(op, "lora_a", lora_a, 2, "[rank, features]");
  check_dim(op, "lora_b", lora_b, 2, "[out_features, rank]");

  const Problem problem{weight.size(1), weight.size(0), lora_a.size(0)};
  const auto& [features, out_features, rank] = problem;
  PEFTOPS_CHECK(features == x_features, op, ": weight has ", features, " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_a.size(1) == x_features, op, ": lora_a has ", lora_a.size(1), " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_b.size(0) == out_features, op, ": lora_b has ", lora_b.size(0), " rows, but weight has ", out_features);
  PEFTOPS_CHECK(lora_b.size(1) == rank, op, ": lora_b has ", lora_b.size(1), " columns, but lora_a has ", rank, " rows");

  check_dtype(op, "weight", weight, type, "x has");
  check_dtype(op, "lora_b", lora_b, lora_a.scalar_type(), "lora_a has");
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  PEFTOPS_CHECK(lora_a.scalar_type() == type || (narrow && lora_a.scalar_type() == ScalarType::Float), op, ": lora_a has dtype ",
                name_of(lora_a.scalar_type()), ", but must have x's, ", name_of(type), narrow ? ", or float32" : "");
  for (const auto& [name, tensor] : {std::pair{"weight", &weight}, std::pair{"lora_a", &lora_a}, std::pair{"lora_b", &lora_b}})
    check_same_device(op, name, *tensor, x);

  if (bias) {
    PEFTOPS_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must have shape [", out_features, "], but has ",
                  shape_of(*bias));
    check_dtype(op, "bias", *bias, type, "x has");
    check_same_device(op, "bias", *bias, x);
  }
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

}  // namespace peftops::lora
