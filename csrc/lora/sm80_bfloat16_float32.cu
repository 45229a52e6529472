#include "sm80.cuh"

namespace peftops::lora {

Kernel<FactorTask> factor_operand_kernel() { return sm80::factor_operand<float>; }

const Kernels& kernels_bfloat16_float32() { return sm80::kernels<bfloat16, float>(); }

}  // namespace peftops::lora
