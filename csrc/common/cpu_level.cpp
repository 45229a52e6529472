#include <string>

#include "export.h"
#include "parallel.h"

namespace peftops {
namespace {

struct Choice {
  CpuLevel level;
  std::string error;
};

// A wrong PEFTOPS_CPU_LEVEL is reported when the package is imported; an exception from inside an operator would lose its text.
Choice choose() {
  try {
    return {choose_cpu_level(best_cpu_level(), std::getenv("PEFTOPS_CPU_LEVEL")), ""};
  } catch (const std::runtime_error& error) {
    return {best_cpu_level(), error.what()};
  }
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

CpuLevel cpu_level() { return choice().level; }

}  // namespace peftops

const char* peftops_cpu_level() { return peftops::kCpuLevelNames[static_cast<int>(peftops::cpu_level())]; }
const char* peftops_cpu_level_error() { return peftops::choice().error.c_str(); }
