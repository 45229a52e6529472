// The launch of the segmented-K GEMM for sm_90a. Each gemm_sm90_*.cu makes that of one type: most of the
// compiler's time goes into CUTLASS's headers, so the type's kernels stand together.
#pragma once

#include <cstring>

#include "../common/launch.h"
#include "gemm_sm90.cuh"

namespace peftops::lora {

// Tensor maps come from the driver, which refuses what it does not know: such a map stays empty.
inline bool is_encoded(const cute::TmaDescriptor& map) {
  const cute::TmaDescriptor empty{};
  return std::memcmp(&map, &empty, sizeof empty) != 0;
}

template <class Element, bool kDown, int kCandidate>
void launch_gemm_sm90(const Launcher& launch, const GemmTask& task, const GemmSm90Plan& plan, bool programmatic) {
  using Gemm = sm90::Gemm<Element, kDown, kCandidate>;
  const auto params = Gemm::params_of(task, plan, launch.device().sm_count);
  bool encoded = is_encoded(*params.epilogue.tma_store_d.get_tma_descriptor());
  for (int j = 0; j < task.count; ++j) encoded = encoded && is_encoded(params.mainloop.x[j]) && is_encoded(params.mainloop.w[j]);
  PEFTOPS_CHECK(encoded, "the CUDA driver makes no tensor maps: it is older than CUDA ", CUDART_VERSION / 1000);
  const dim3 grid = Gemm::Kernel::get_grid_shape(params);
  launch(&sm90::gemm<Element, kDown, kCandidate>, {grid.x, grid.y, grid.z}, kSm90Threads, Gemm::kTile.shared_memory, params,
         {kSm90Cluster, programmatic});
}

template <class Element>
void gemm_sm90(const Launcher& launch, const GemmTask& task, const GemmSm90Plan& plan, bool programmatic) {
  static_assert(kSm90Candidates == 2);
  const bool down = task.segments[0].down;
  (plan.candidate == 0
       ? (down ? launch_gemm_sm90<Element, true, 0> : launch_gemm_sm90<Element, false, 0>)
       : (down ? launch_gemm_sm90<Element, true, 1> : launch_gemm_sm90<Element, false, 1>))(launch, task, plan, programmatic);
}

}  // namespace peftops::lora
