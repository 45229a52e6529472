// What every backend of the LoRA operators shares: the checked problem.
#pragma once

#include <optional>

#include "../common/check.h"

namespace peftops::lora {

struct Problem {
  int64_t features, out_features, rank;
};

// Raises an error that names the argument, what it got and what it wanted. x_features is x's last size; it is given apart, because
// backward has no x where no gradient needs it.
Problem check_problem(const char* op, const Tensor& x, int64_t x_features, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& tensor_scale, double dropout_p,
                      const std::optional<Tensor>& seed);

void check_dropout(const char* op, double p, const char* name);
void check_seed(const char* op, const Tensor& seed);

}  // namespace peftops::lora
