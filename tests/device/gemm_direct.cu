// Launches segmented GEMMs on any task, for test_gemm_sm80.py.
#include "../../csrc/lora/gemm.h"

#include <cstring>

#include <cuda_runtime_api.h>
#include <sys/mman.h>

using namespace peftops::lora;

extern "C" {

size_t gemm_task_bytes() { return sizeof(GemmTask); }

// The status of a launch that makes all of D.
int gemm_direct(const char* type, int down, const GemmTask* task) {
  const GemmKernels& kernels = std::strcmp(type, "bfloat16") == 0 ? gemm_sm80_bfloat16() : gemm_sm80_float16();
  const void* const kernel = reinterpret_cast<const void*>(down ? kernels.down : kernels.rows);
  if (const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGemmMemory)) return status;
  const GemmPlan plan = plan_gemm_sm80(task->rows, task->columns);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.row_blocks * plan.column_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kGemmMemory;
  struct {
    GemmTask task;
    unsigned char rest[1024];  // the emulator copies more than the struct
  } argument{*task, {}};
  void* arguments[] = {&argument};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

// Memory of whole pages before one that cannot be touched.
void* gemm_memory(size_t bytes) {
  const size_t page = 4096, inner = (bytes + page - 1) / page * page;
  auto* all = static_cast<unsigned char*>(mmap(nullptr, inner + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(all + inner, page, PROT_NONE);
  return all + inner - bytes;
}
}
