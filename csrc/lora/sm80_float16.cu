#include "sm80.cuh"

namespace peftops::lora {

const Kernels& kernels_float16() { return sm80::kernels<float16, float16>(); }

}  // namespace peftops::lora
