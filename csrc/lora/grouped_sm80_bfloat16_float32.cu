#include "grouped_few_sm80.cuh"

namespace peftops::lora {

const GroupedKernels& grouped_kernels_bfloat16_float32() { return sm80::grouped_kernels<bfloat16, float>(); }

}  // namespace peftops::lora
