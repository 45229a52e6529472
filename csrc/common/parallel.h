// CPU instruction-set levels. Kernels are compiled once per level (CMakeLists.txt) and chosen once, when the library loads.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace peftops {

enum class CpuLevel { baseline, avx2, avx512 };

constexpr const char* kCpuLevelNames[] = {"baseline", "avx2", "avx512"};
constexpr int kCpuLevels = 3;

// The highest level that this machine runs.
inline CpuLevel best_cpu_level() {
#ifdef PEFTOPS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("bmi2"))
    return CpuLevel::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return CpuLevel::avx2;
#endif
  return CpuLevel::baseline;
}

// `best`, lowered to `wanted` where that is set (PEFTOPS_CPU_LEVEL); raising it or an unknown name is an error.
inline CpuLevel choose_cpu_level(CpuLevel best, const char* wanted) {
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < kCpuLevels; ++level) {
    if (std::strcmp(wanted, kCpuLevelNames[level]) != 0) continue;
    if (level > static_cast<int>(best))
      throw std::runtime_error(std::string("PEFTOPS_CPU_LEVEL is ") + wanted + ", but this machine only runs " +
                               kCpuLevelNames[static_cast<int>(best)]);
    return static_cast<CpuLevel>(level);
  }
  throw std::runtime_error(std::string("PEFTOPS_CPU_LEVEL is ") + wanted + ", but must be baseline, avx2 or avx512");
}

// The level in use; defined in cpu_level.cpp.
CpuLevel cpu_level();

}  // namespace peftops
