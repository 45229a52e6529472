#include "sm80.cuh"

namespace peftops::lora {

const Kernels& kernels_float16_float32() { return sm80::kernels<float16, float>(); }

}  // namespace peftops::lora
