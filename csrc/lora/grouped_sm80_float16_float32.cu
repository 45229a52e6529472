#include "grouped_few_sm80.cuh"

namespace peftops::lora {

const GroupedKernels& grouped_kernels_float16_float32() { return sm80::grouped_kernels<float16, float>(); }

}  // namespace peftops::lora
