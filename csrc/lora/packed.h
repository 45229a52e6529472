// Checks of the operators with a packed weight.
#pragma once

#include "lora.h"

namespace peftops::lora::packed {

// Each raises an error that names the argument, what it got and what it wanted.
void check_pack_weight(const Tensor& weight);
Problem check_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                     const Tensor& scale, int64_t out_features);

}  // namespace peftops::lora::packed
