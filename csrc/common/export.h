// What libpeftops exports beside its operators (libpeftops.map lists it as well).
#pragma once

#define PEFTOPS_EXPORT extern "C" __attribute__((visibility("default")))

// Instruction-set level of the CPU kernels in use.
PEFTOPS_EXPORT const char* peftops_cpu_level();

// What is wrong with the environment variable PEFTOPS_CPU_LEVEL; empty if nothing is.
PEFTOPS_EXPORT const char* peftops_cpu_level_error();
