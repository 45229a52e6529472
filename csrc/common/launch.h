// The one door for CUDA launches: device guard, the tensor's stream, grid limits, shared-memory opt-in and the error check.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <type_traits>

#include "check.h"
#include "device.h"

namespace peftops {

constexpr int64_t kDefaultSharedMemory = 48 * 1024;  // what a block may have without opt-in
constexpr int kMinSm = 80;
constexpr size_t kMostArgumentBytes = 4096;

struct Grid {
  int64_t x, y = 1, z = 1;
};

// How a launch's blocks go together, and the launch with the one before it on the stream.
struct Together {
  int cluster = 1;            // blocks of a cluster, along x; the grid is a multiple of it
  bool programmatic = false;  // may start while the kernel before still runs, and waits for it on the device
};

// One operator call on a GPU: its device is current while this lives, and every launch goes to that device's current stream.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on) : op_(op), guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    const int index = on.get_device_index();
    device_.sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
    device_.sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
    device_.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    PEFTOPS_CHECK(device_.sm >= kMinSm, op, ": CUDA kernels need compute capability 8.0 or higher, but this GPU has ", device_.sm / 10, ".",
                  device_.sm % 10);
  }

  const Device& device() const { return device_; }
  const char* op() const { return op_; }

  // Every kernel takes one struct.
  template <class Task>
  void operator()(void (*kernel)(Task), Grid grid, int threads, int64_t shared_memory, const Task& task, Together together = {}) const {
    // The emulator of the tests does not know the type: it passes the struct as a caller would, in memory.
    static_assert(std::is_trivially_copyable_v<Task> && sizeof(Task) > 16 && sizeof(Task) <= kMostArgumentBytes);
    PEFTOPS_CHECK(
        grid.x > 0 && grid.x <= std::numeric_limits<int32_t>::max() && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535, op_,
        ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks is more than CUDA launches");
    PEFTOPS_CHECK(shared_memory <= device_.shared_memory, op_, ": needs ", shared_memory, " bytes of shared memory, but a block has ",
                  device_.shared_memory);
    const void* function = reinterpret_cast<const void*>(kernel);
    // Each time: whether it was done belongs to a device and a context, and it is cheap.
    if (shared_memory > kDefaultSharedMemory)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
    config.stream = stream_;
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (together.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(together.cluster), 1, 1};
    }
    if (together.programmatic) {
      cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    void* arguments[] = {const_cast<Task*>(&task)};
    check(cudaLaunchKernelExC(&config, function, arguments));
  }

 private:
  int attribute(cudaDeviceAttr which, int index) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }

  void check(cudaError_t status) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // else the next call of anybody would report it again
    fail(op_, ": CUDA error: ", cudaGetErrorString(status));
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  Device device_;
};

}  // namespace peftops
