#include "gemm_sm90_call.h"

namespace peftops::lora {

template void gemm_sm90<bfloat16>(const Launcher&, const GemmTask&, const GemmSm90Plan&, bool);

}  // namespace peftops::lora
