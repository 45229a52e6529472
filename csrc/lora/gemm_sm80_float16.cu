#include "gemm_sm80.cuh"

namespace peftops::lora {

const GemmKernels& gemm_sm80_float16() { return sm80::gemm_kernels<float16>(); }

}  // namespace peftops::lora
