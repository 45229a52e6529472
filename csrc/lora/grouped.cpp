#include "grouped.h"

#include <utility>

namespace peftops::lora {
namespace {

void check_integer(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  PEFTOPS_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ", name, " has dtype ", name_of(type),
                ", but must be int32 or int64");
}

// One adapter for each row of `rows`, which is called `name`.
void check_ids(const char* op, const Tensor& ids, const char* name, const Tensor& rows) {
  check_integer(op, "adapter_ids", ids);
  bool same = ids.dim() + 1 == rows.dim();
  for (int64_t d = 0; same && d < ids.dim(); ++d) same = ids.size(d) == rows.size(d);
  PEFTOPS_CHECK(same, op, ": adapter_ids must have the leading sizes of ", name, ", which has shape ", shape_of(rows), ", but has shape ",
                shape_of(ids));
}

void check_per_adapter(const char* op, const char* name, const Tensor& t, int64_t adapters) {
  PEFTOPS_CHECK(t.dim() == 1 && t.size(0) == adapters, op, ": ", name, " must have shape [", adapters, "], one for each adapter, but has ",
                shape_of(t));
}

// x_features is x's last size; it is given apart, because backward has no x where no gradient needs it. `like` has x's dtype.
GroupedProblem check_problem(const char* op, const Tensor& like, int64_t x_features, const Tensor& weight, const Tensor& lora_a,
                             const Tensor& lora_b, const Tensor& scales, const Tensor& adapter_ids, const std::optional<Tensor>& ranks) {
  const ScalarType type = like.scalar_type();
  PEFTOPS_CHECK(is_float(type), op, ": x has dtype ", name_of(type), ", but must be float32, bfloat16, float16 or float64");
  check_dim(op, "weight", weight, 2, "[out_features, features]");
  check_dim(op, "lora_a", lora_a, 3, "[adapters, rank, features]");
  check_dim(op, "lora_b", lora_b, 3, "[adapters, out_features, rank]");

  const GroupedProblem problem{weight.size(1), weight.size(0), lora_a.size(0), lora_a.size(1)};
  const auto& [features, out_features, adapters, rank] = problem;
  PEFTOPS_CHECK(features == x_features, op, ": weight has ", features, " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_a.size(2) == x_features, op, ": lora_a has ", lora_a.size(2), " columns, but x has ", x_features, " features");
  PEFTOPS_CHECK(lora_b.size(0) == adapters, op, ": lora_b has ", lora_b.size(0), " adapters, but lora_a has ", adapters);
  PEFTOPS_CHECK(lora_b.size(1) == out_features, op, ": lora_b has ", lora_b.size(1), " rows, but weight has ", out_features);
  PEFTOPS_CHECK(lora_b.size(2) == rank, op, ": lora_b has ", lora_b.size(2), " columns, but lora_a has ", rank, " rows");

  check_dtype(op, "weight", weight, type, "x has");
  check_dtype(op, "lora_b", lora_b, lora_a.scalar_type(), "lora_a has");
  const bool narrow = type == ScalarType::BFloat16 || type == ScalarType::Half;
  PEFTOPS_CHECK(lora_a.scalar_type() == type || (narrow && lora_a.scalar_type() == ScalarType::Float), op, ": lora_a has dtype ",
                name_of(lora_a.scalar_type()), ", but must have x's, ", name_of(type), narrow ? ", or float32" : "");
  check_per_adapter(op, "scales", scales, adapters);
  check_dtype(op, "scales", scales, ScalarType::Float, "it must be");
  if (ranks) {
    check_per_adapter(op, "ranks", *ranks, adapters);
    check_integer(op, "ranks", *ranks);
    check_same_device(op, "ranks", *ranks, like);
  }
  for (const auto& [name, tensor] : {std::pair{"weight", &weight}, std::pair{"lora_a", &lora_a}, std::pair{"lora_b", &lora_b},
                                     std::pair{"scales", &scales}, std::pair{"adapter_ids", &adapter_ids}})
    check_same_device(op, name, *tensor, like);
  return problem;
}

}  // namespace

GroupedProblem check_grouped_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a,
                                     const Tensor& lora_b, const Tensor& scales, const Tensor& adapter_ids,
                                     const std::optional<Tensor>& ranks) {
  const char* op = "grouped_lora_linear";
  PEFTOPS_CHECK(x.dim() >= 1, op, ": x must be [..., features], but has no dimension");
  const GroupedProblem problem = check_problem(op, x, x.size(x.dim() - 1), weight, lora_a, lora_b, scales, adapter_ids, ranks);
  check_ids(op, adapter_ids, "x", x);
  if (bias) {
    PEFTOPS_CHECK(bias->dim() == 1 && bias->size(0) == problem.out_features, op, ": bias must have shape [", problem.out_features,
                  "], but has ", shape_of(*bias));
    check_dtype(op, "bias", *bias, x.scalar_type(), "x has");
    check_same_device(op, "bias", *bias, x);
  }
  return problem;
}

GroupedProblem check_grouped_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_a,
                                      const Tensor& lora_b, const Tensor& scales, const Tensor& adapter_ids,
                                      const std::optional<Tensor>& ranks, const Tensor& s, bool needs_x) {
  const char* op = "grouped_lora_linear_backward";
  PEFTOPS_CHECK(x.has_value() || !needs_x, op, ": x is needed for the gradients of weight and lora_a");
  check_dim(op, "weight", weight, 2, "[out_features, features]");
  PEFTOPS_CHECK(!x || x->dim() >= 1, op, ": x must be [..., features], but has no dimension");
  const GroupedProblem problem =
      check_problem(op, x ? *x : grad, x ? x->size(x->dim() - 1) : weight.size(1), weight, lora_a, lora_b, scales, adapter_ids, ranks);
  check_dtype(op, "grad", grad, weight.scalar_type(), "weight has");
  PEFTOPS_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == problem.out_features, op, ": grad must be [..., ", problem.out_features,
                "], but has shape ", shape_of(grad));
  const int64_t rows = rows_of(grad);
  PEFTOPS_CHECK(!x || rows_of(*x) == rows, op, ": x has ", x ? rows_of(*x) : 0, " rows, but grad has ", rows);
  check_ids(op, adapter_ids, "grad", grad);
  PEFTOPS_CHECK(s.dim() == 2 && s.size(0) == rows && s.size(1) == problem.rank && s.scalar_type() == accumulator_of(grad), op,
                ": s must be what grouped_lora_linear_forward returned, [", rows, ", ", problem.rank, "], but has shape ", shape_of(s));
  for (const auto& [name, tensor] : {std::pair{"grad", &grad}, std::pair{"s", &s}}) check_same_device(op, name, *tensor, weight);
  return problem;
}

}  // namespace peftops::lora
