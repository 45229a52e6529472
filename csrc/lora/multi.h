// What every backend of lora_linear_multi shares: several projections of one x, each with its own weight, factors, scale and mask.
#pragma once

#include "lora.h"

namespace peftops::lora {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

struct MultiProblem {
  int64_t features;
  std::vector<int64_t> out_features, ranks, first_rank;  // first_rank: a projection's first column of s
  int64_t rank;                                          // all together

  int64_t count() const { return static_cast<int64_t>(ranks.size()); }
};

// Each raises an error that names the argument, what it got and what it wanted.
MultiProblem check_multi_forward(const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const Tensors& lora_a,
                                 const Tensors& lora_b, const Tensor& scales, double dropout_p, const std::optional<Tensor>& seeds);
MultiProblem check_multi_backward(const OptionalTensors& grads, const std::optional<Tensor>& x, const Tensors& weights,
                                  const Tensors& lora_a, const Tensors& lora_b, const Tensor& scales, double dropout_p, const Tensor& s,
                                  const Tensor& masks, const std::vector<bool>& need_weight, const std::vector<bool>& need_bias,
                                  const std::vector<bool>& need_a, const std::vector<bool>& need_b);

// grad_x, grad_weights, grad_biases, grad_a, grad_b.
using MultiGradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors>;

// What lora_linear_multi_backward returns: grad_x in the leading sizes of `grad`, and an empty tensor for each that is undefined.
MultiGradients multi_backward_results(const Tensor& grad, int64_t features, MultiGradients found);

}  // namespace peftops::lora
