// LoRA with an adapter for each token: the checked problem.
#pragma once

#include "lora.h"

namespace peftops::lora {

struct GroupedProblem {
  int64_t features, out_features, adapters, rank;
};

// Each raises an error that names the argument, what it got and what it wanted. What the values of adapter_ids and ranks are is not
// looked at: they may lie on a device.
GroupedProblem check_grouped_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a,
                                     const Tensor& lora_b, const Tensor& scales, const Tensor& adapter_ids,
                                     const std::optional<Tensor>& ranks);
GroupedProblem check_grouped_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_a,
                                      const Tensor& lora_b, const Tensor& scales, const Tensor& adapter_ids,
                                      const std::optional<Tensor>& ranks, const Tensor& s, bool needs_x);

}  // namespace peftops::lora
