// What every backend of the LoRA operators shares: the checked problem, the base product and its gradients.
#pragma once

#include <optional>
#include <tuple>

#include "../common/check.h"
#include "../common/tensor.h"

namespace peftops::lora {

struct Problem {
  int64_t features, out_features, rank;
};

// How errors name a tensor of one projection: "lora_a", or "lora_a[1]" where an operator takes several.
struct Named {
  const char* name;
  int64_t index;  // -1: the only one
};
inline std::ostream& operator<<(std::ostream& out, const Named& named) {
  out << named.name;
  return named.index < 0 ? out : out << '[' << named.index << ']';
}

// What every operator of the room asks of one projection of x. x_features is x's last size, given apart: backward may have no x.
Problem check_projection(const char* op, const Tensor& x, int64_t x_features, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& lora_a, const Tensor& lora_b, int64_t index = -1);
int64_t features_of(const char* op, const Tensor& x);
void check_dropout(const char* op, double p, const char* name);

// Each raises an error that names the argument, what it got and what it wanted. `lora_linear_forward` answers in the name of
// `lora_linear`, which callers know.
Problem check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                      const std::optional<Tensor>& tensor_scale, double dropout_p, const std::optional<Tensor>& seed);
Problem check_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                       const std::optional<Tensor>& tensor_scale, double dropout_p, const Tensor& s, const Tensor& mask, bool needs_x);
void check_dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p);

// x W^T + bias by the vendor's GEMM, contiguous.
Tensor base_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

// Gradients of x (as a matrix), weight and bias without the adapter; undefined where not needed.
std::tuple<Tensor, Tensor, Tensor> base_gradients(const Rows& grad, const Tensor& weight, const std::optional<Rows>& x, bool need_x,
                                                  bool need_weight, bool need_bias);

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What lora_linear_backward returns: grad_x in the leading sizes of grad, and an empty tensor of its own for each that is undefined.
Gradients backward_results(const Tensor& grad, int64_t features, Gradients found);

}  // namespace peftops::lora
