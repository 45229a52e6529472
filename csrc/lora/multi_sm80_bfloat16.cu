#include "multi_sm80.cuh"

namespace peftops::lora {

const MultiKernels& multi_kernels_bfloat16() { return sm80::multi_kernels<bfloat16>(); }

}  // namespace peftops::lora
