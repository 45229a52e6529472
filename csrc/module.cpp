// The Python module `_C`: build facts, and the pure host functions that property tests call. No operator needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/export.h"
#include "common/index.h"
#include "common/numeric.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "lora/plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and host functions of peftops.";
  m.attr("version") = PEFTOPS_VERSION;
  m.attr("cpu_levels") = py::str(PEFTOPS_CPU_LEVELS).attr("split")(",");
  m.attr("cuda_targets") = py::list();
  m.def("cpu_level", [] { return peftops_cpu_level(); }, "Instruction-set level of the CPU kernels in use.");
  m.def(
      "best_cpu_level", [] { return peftops::kCpuLevelNames[static_cast<int>(peftops::best_cpu_level())]; },
      "Highest instruction-set level that this machine runs.");

  m.def("ceil_div", &peftops::ceil_div);
  m.def("round_up", &peftops::round_up);
  m.def("offset_of", &peftops::offset_of);
  m.def("checked_product", [](int64_t a, int64_t b) { return peftops::checked_product(a, b, "product"); });
  m.def("checked_int32", [](int64_t value) { return peftops::checked_int32(value, "value"); });

  m.def("bfloat16_to_float", [](uint16_t bits) { return peftops::to_float(peftops::bfloat16{bits}); });
  m.def("float_to_bfloat16", [](float value) { return peftops::to_bfloat16(value).bits; });
  m.def("float16_to_float", [](uint16_t bits) { return peftops::to_float(peftops::float16{bits}); });
  m.def("float_to_float16", [](float value) { return peftops::to_float16(value).bits; });

  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const peftops::Philox4 out = peftops::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
  });
  m.def("dropout_threshold", &peftops::dropout_threshold);
  m.def("dropout_byte", &peftops::dropout_byte);

  m.def("lora_gradient_panel", &peftops::lora::gradient_panel, "Width of the column panels of LoRA's gradient pass.");
}
