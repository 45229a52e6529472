#include "parallel.h"

#include "export.h"

namespace peftops {

CpuLevel cpu_level() {
  static const CpuLevel level = choose_cpu_level(best_cpu_level(), std::getenv("PEFTOPS_CPU_LEVEL"));
  return level;
}

}  // namespace peftops

const char* peftops_cpu_level() { return peftops::kCpuLevelNames[static_cast<int>(peftops::cpu_level())]; }
