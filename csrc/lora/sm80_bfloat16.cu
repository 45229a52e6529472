#include "sm80.cuh"

namespace peftops::lora {

const Kernels& kernels_bfloat16() { return sm80::kernels<bfloat16, bfloat16>(); }

}  // namespace peftops::lora
