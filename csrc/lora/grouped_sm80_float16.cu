#include "grouped_few_sm80.cuh"

namespace peftops::lora {

const GroupedKernels& grouped_kernels_float16() { return sm80::grouped_kernels<float16, float16>(); }

}  // namespace peftops::lora
