#include "packed.h"

#include <utility>

#include "../common/index.h"
#include "plan.h"

namespace peftops::lora::packed {
namespace {

// "weight has dtype int8, but must be ...": what both operators take.
void check_float(const char* op, const char* name, const Tensor& t) {
  PEFTOPS_CHECK(is_float(t.scalar_type()), op, ": ", name, " has dtype ", name_of(t.scalar_type()),
                ", but must be float32, bfloat16, float16 or float64");
}

void check_factors(const char* op, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Problem& problem) {
  const auto& [features, out_features, rank] = problem;
  PEFTOPS_CHECK(lora_a.size(1) == features, op, ": lora_a has ", lora_a.size(1), " columns, but x has ", features, " features");
  PEFTOPS_CHECK(lora_b.size(0) == out_features, op, ": lora_b has ", lora_b.size(0), " rows, but out_features is ", out_features);
  PEFTOPS_CHECK(lora_b.size(1) == rank, op, ": lora_b has ", lora_b.size(1), " columns, but lora_a has ", rank, " rows");
  const ScalarType type = x.scalar_type();
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  PEFTOPS_CHECK(lora_a.scalar_type() == type || (narrow && lora_a.scalar_type() == ScalarType::Float), op, ": lora_a has dtype ",
                name_of(lora_a.scalar_type()), ", but must have x's, ", name_of(type), narrow ? ", or float32" : "");
  check_dtype(op, "lora_b", lora_b, lora_a.scalar_type(), "lora_a has");
}

}  // namespace

void check_pack_weight(const Tensor& weight) {
  check_dim("pack_weight", "weight", weight, 2, "[out_features, features]");
  check_float("pack_weight", "weight", weight);
}

Problem check_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                     const Tensor& scale, int64_t out_features) {
  const char* op = "lora_linear_packed";
  check_float(op, "x", x);
  PEFTOPS_CHECK(x.dim() >= 1, op, ": x must be [..., features], but has no dimension");
  PEFTOPS_CHECK(out_features >= 0, op, ": out_features is ", out_features, ", but must not be negative");
  check_dim(op, "lora_a", lora_a, 2, "[rank, features]");
  check_dim(op, "lora_b", lora_b, 2, "[out_features, rank]");
  const Problem problem{x.size(x.dim() - 1), out_features, lora_a.size(0)};

  check_dtype(op, "packed", packed, x.scalar_type(), "x has");
  const int64_t blocks = ceil_div(out_features, kPackedLanes), steps = ceil_div(problem.features, 2);
  PEFTOPS_CHECK(
      packed.dim() == 4 && packed.size(0) == blocks && packed.size(1) == steps && packed.size(2) == kPackedLanes && packed.size(3) == 2, op,
      ": packed must be what pack_weight returned for [", out_features, ", ", problem.features, "], [", blocks, ", ", steps, ", ",
      kPackedLanes, ", 2], but has shape ", shape_of(packed));
  check_factors(op, x, lora_a, lora_b, problem);
  if (bias) {
    PEFTOPS_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must have shape [", out_features, "], but has ",
                  shape_of(*bias));
    check_dtype(op, "bias", *bias, x.scalar_type(), "x has");
    check_same_device(op, "bias", *bias, x);
  }
  PEFTOPS_CHECK(scale.dim() == 0, op, ": scale must have shape [], but has ", shape_of(scale));
  check_dtype(op, "scale", scale, ScalarType::Float, "it must be");
  for (const auto& [name, tensor] :
       {std::pair{"packed", &packed}, std::pair{"lora_a", &lora_a}, std::pair{"lora_b", &lora_b}, std::pair{"scale", &scale}})
    check_same_device(op, name, *tensor, x);
  return problem;
}

}  // namespace peftops::lora::packed
