#include "multi_sm80.cuh"

namespace peftops::lora {

const MultiKernels& multi_kernels_float16() { return sm80::multi_kernels<float16>(); }

}  // namespace peftops::lora
