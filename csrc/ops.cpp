// Every operator of peftops, one line of law each, grouped by family. This file is the table of contents: no logic here.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peftops, m) {
  // lora/: y = x W^T + bias + scale * keep(x) / (1 - p) A^T B^T. x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r] -> [..., N].
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale=1.0, float dropout_p=0.0, "
      "Tensor? seed=None) -> Tensor");
  // The same with a scale that changes between calls: float32, 0-d; 0 means no adapter, exactly.
  m.def(
      "lora_linear.tensor_scale(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scale, "
      "float dropout_p=0.0, Tensor? seed=None) -> Tensor");
  // The same with what backward needs: S = scale / (1 - p) * keep(x) A^T [M, r], keep-bits uint8 [M, ceil(K / 8)] ([0] where p = 0).
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, Tensor? tensor_scale, "
      "float dropout_p, Tensor? seed) -> (Tensor y, Tensor s, Tensor mask)");
  // Gradients of x, weight, bias, lora_a, lora_b; [0] for each that is not needed.
  m.def(
      "lora_linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? tensor_scale, "
      "float dropout_p, Tensor s, Tensor mask, bool need_x, bool need_weight, bool need_bias, bool need_a, bool need_b) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_a, Tensor grad_b)");
  // Row by row with the adapter that adapter_ids names, of lora_a [L, r, K], lora_b [L, N, r], scales float32 [L]: y_i = x_i W^T + bias +
  // scales[l] x_i A_l^T B_l^T, l = adapter_ids[i], int32 or int64 of x.shape[:-1]; -1 means none. Of ranks only the first ranks[l] exist.
  m.def(
      "grouped_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scales, Tensor adapter_ids, "
      "Tensor? ranks=None) -> Tensor");
  // The same with what backward needs: S = scales[l] x_i A_l^T [M, r], zero where there is no adapter or rank.
  m.def(
      "grouped_lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scales, "
      "Tensor adapter_ids, Tensor? ranks=None) -> (Tensor y, Tensor s)");
  // Gradients of x, weight, bias, lora_a [L, r, K], lora_b [L, N, r]; [0] for each that is not needed.
  m.def(
      "grouped_lora_linear_backward(Tensor grad, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scales, "
      "Tensor adapter_ids, Tensor? ranks, Tensor s, bool need_x, bool need_weight, bool need_bias, bool need_a, bool need_b) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_a, Tensor grad_b)");
  // P projections of one x, as lora_linear makes each: weights, biases, lora_a, lora_b are lists; scales float32 [P] (0: the base alone),
  // seeds int64 [P]; ranks may differ.
  m.def(
      "lora_linear_multi(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, Tensor scales, "
      "float dropout_p=0.0, Tensor? seeds=None) -> Tensor[]");
  // The same with what backward needs: the S_j side by side [M, sum of ranks], keep-bits uint8 [P, M, ceil(K / 8)] ([0] where p = 0).
  m.def(
      "lora_linear_multi_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, Tensor scales, "
      "float dropout_p, Tensor? seeds) -> (Tensor[] ys, Tensor s, Tensor masks)");
  // Gradients of x, weights, biases, lora_a, lora_b; [0] for each that is not needed or whose projection has no gradient.
  m.def(
      "lora_linear_multi_backward(Tensor?[] grads, Tensor? x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor scales, "
      "float dropout_p, Tensor s, Tensor masks, bool need_x, bool[] need_weight, bool[] need_bias, bool[] need_a, bool[] need_b) "
      "-> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_biases, Tensor[] grad_a, Tensor[] grad_b)");
  // A frozen weight [N, K] in the order in which few rows read it: [ceil(N / 16), ceil(K / 2), 16, 2], element [i, k, j, l] =
  // weight[16 i + j, 2 k + l], zero beyond. CPU only.
  m.def("pack_weight(Tensor weight) -> Tensor");
  // lora_linear without dropout and without gradients on such a weight; scale float32, 0-d. CPU only.
  m.def(
      "lora_linear_packed(Tensor x, Tensor packed, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scale, int out_features) -> Tensor");
  // True where dropout keeps: Philox4x32-10, key = seed, counter = (column / 8, row low, row high, 0), 16 bits per element.
  m.def("lora_dropout_mask(Tensor seed, int rows, int cols, float p) -> Tensor");
}
