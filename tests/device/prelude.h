// Included before a .cu file that a C++ compiler compiles for the emulator: what nvcc knows by itself.
#pragma once

#include <cuda_runtime.h>
#include <device_launch_parameters.h>

#define __launch_bounds__(...)
// A plain variable would be one per thread: shared memory is dynamic only.
#undef __shared__
#define __shared__ static_assert(false, "the emulator knows dynamic shared memory only");

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);
