#include "sm80.cuh"

namespace peftops::lora {

const Kernels& kernels_bfloat16_float32() { return sm80::kernels<bfloat16, float>(); }

}  // namespace peftops::lora
