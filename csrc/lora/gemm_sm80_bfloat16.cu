#include "gemm_sm80.cuh"

namespace peftops::lora {

const GemmKernels& gemm_sm80_bfloat16() { return sm80::gemm_kernels<bfloat16>(); }

}  // namespace peftops::lora
