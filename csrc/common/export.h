// What libpeftops exports beside its operators: facts that the Python module `_C` reports.
#pragma once

extern "C" __attribute__((visibility("default"))) const char* peftops_cpu_level();
