// Calls of other operators through the dispatcher.
#pragma once

#include <array>
#include <cstddef>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace peftops {

// Calls `op` (its overload without a name) with `args`; the first `outputs` results, all tensors.
template <size_t kOutputs, class... Args>
std::array<torch::stable::Tensor, kOutputs> call(const char* op, const Args&... args) {
  using torch::stable::detail::from, torch::stable::detail::to;
  constexpr size_t kSlots = sizeof...(Args) > kOutputs ? sizeof...(Args) : kOutputs;
  std::array<StableIValue, kSlots> stack{from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  std::array<torch::stable::Tensor, kOutputs> results;
  for (size_t i = 0; i < kOutputs; ++i) results[i] = to<torch::stable::Tensor>(stack[i]);
  return results;
}

}  // namespace peftops
