#include "grouped_few_sm80.cuh"
#include "grouped_tokens.cuh"

namespace peftops::lora {

Kernel<GroupTask> group_kernel() { return sm80::group_tokens<int32_t>; }
Kernel<GroupFewTask> group_few_kernel() { return sm80::group_few_tokens<int32_t>; }
Kernel<ListTask> list_kernel() { return sm80::list_tiles<int32_t>; }

const GroupedKernels& grouped_kernels_float32() { return sm80::grouped_kernels<float, float>(); }

}  // namespace peftops::lora
