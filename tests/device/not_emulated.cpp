// Stands in for the kernels that the emulator cannot run.
#include <stdexcept>

#include "../../csrc/lora/gemm_sm90.h"

namespace peftops::lora {

template <class Element>
void gemm_sm90(const Launcher&, const GemmTask&, const GemmSm90Plan&, bool) {
  throw std::runtime_error("the emulator knows neither TMA nor wgmma");
}

template void gemm_sm90<bfloat16>(const Launcher&, const GemmTask&, const GemmSm90Plan&, bool);
template void gemm_sm90<float16>(const Launcher&, const GemmTask&, const GemmSm90Plan&, bool);

}  // namespace peftops::lora
