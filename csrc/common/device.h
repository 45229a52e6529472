// What a plan may know of a GPU.
#pragma once

#include <cstdint>

namespace peftops {

struct Device {
  int sm;                 // compute capability, 90 for 9.0
  int sm_count;           // streaming multiprocessors
  int64_t shared_memory;  // bytes that one block may have, with opt-in
};

}  // namespace peftops
