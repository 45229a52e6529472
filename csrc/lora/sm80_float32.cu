#include "sm80.cuh"

namespace peftops::lora {

Kernel<DropoutMaskTask> dropout_mask_kernel() { return sm80::dropout_mask<bool>; }

const Kernels& kernels_float32() { return sm80::kernels<float, float>(); }

}  // namespace peftops::lora
