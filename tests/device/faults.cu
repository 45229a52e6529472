// Launchers for the recorded-launch test: each fault that it must notice, beside clean twins. All are called with a device and a count.
#include <cuda_runtime.h>

#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

constexpr int kThreads = 256;
constexpr int kMuchSharedMemory = 64 * 1024;

struct CountTask {
  float* data;
  int64_t count;
  int64_t unused[2];
};

__global__ void __launch_bounds__(kThreads) fill(const CountTask task) {
  extern __shared__ float shared_memory[];
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  shared_memory[threadIdx.x] = 1.0f;
  if (i < task.count) task.data[i] = shared_memory[threadIdx.x];
}

int64_t blocks(int64_t count) { return (count + kThreads - 1) / kThreads; }

cudaStream_t stream_of(int device) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device, &stream);
  return static_cast<cudaStream_t>(stream);
}

class Guard {
 public:
  explicit Guard(int device) {
    cudaGetDevice(&before_);
    if (device != before_) cudaSetDevice(device);
    changed_ = device != before_;
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_;
  bool changed_;
};

void launch(int64_t count, int64_t grid, cudaStream_t stream, int threads = kThreads, int shared_memory = 1024) {
  fill<<<static_cast<unsigned>(grid), threads, shared_memory, stream>>>(CountTask{nullptr, count, {}});
}

void opt_in(int bytes) { cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); }

}  // namespace

extern "C" {

// ---- clean ------------------------------------------------------------------------------------------------------------------------------

void clean(int device, int64_t count) {
  if (count == 0) return;
  const Guard guard(device);
  opt_in(kMuchSharedMemory);
  launch(count, blocks(count), stream_of(device), kThreads, kMuchSharedMemory);
}

// As CUTLASS launches.
void clean_exc(int device, int64_t count) {
  if (count == 0) return;
  const Guard guard(device);
  CountTask task{nullptr, count, {}};
  void* arguments[] = {&task};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks(count)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = 1024;
  config.stream = stream_of(device);
  cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(fill), arguments);
}

// ---- faults -----------------------------------------------------------------------------------------------------------------------------

void launch_for_empty_input(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count) + (count == 0), stream_of(device));
}

void grid_of_zero(int device, int64_t count) {
  const Guard guard(device);
  launch(count, count / (int64_t{1} << 40), stream_of(device));
}

void legacy_stream(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count), nullptr);
}

void stream_of_another_device(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count), stream_of(1 - device));
}

void no_guard(int device, int64_t count) { launch(count, blocks(count), stream_of(device)); }

void device_left(int device, int64_t count) {
  cudaSetDevice(device);
  launch(count, blocks(count), stream_of(device));
}

// 3e9 elements are -1 294 967 296 in 32 bits.
void wrapped_count(int device, int64_t count) {
  const Guard guard(device);
  const int narrow = static_cast<int>(count);
  launch(count, (narrow + kThreads - 1) / kThreads, stream_of(device));
}

// The same in unsigned arithmetic, from 2^32 on: a grid that CUDA takes, of too few blocks.
void wrapped_unsigned_count(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(static_cast<uint32_t>(count)), stream_of(device));
}

void narrowed_argument(int device, int64_t count) {
  const Guard guard(device);
  launch(static_cast<int>(count), blocks(count), stream_of(device));
}

void no_opt_in(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count), stream_of(device), kThreads, kMuchSharedMemory);
}

// Once for the process, so for the first device alone.
void opt_in_cached(int device, int64_t count) {
  const Guard guard(device);
  static const bool done = (opt_in(kMuchSharedMemory), true);
  if (done) launch(count, blocks(count), stream_of(device), kThreads, kMuchSharedMemory);
}

void too_much_shared_memory(int device, int64_t count) {
  const Guard guard(device);
  opt_in(160 * 1024);
  launch(count, blocks(count), stream_of(device), kThreads, 160 * 1024);
}

void too_many_threads(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count), stream_of(device), 2 * kThreads);
}

void hidden_allocation(int device, int64_t count) {
  const Guard guard(device);
  void* workspace = nullptr;
  cudaMalloc(&workspace, 1024);
  launch(count, blocks(count), stream_of(device));
  cudaFree(workspace);
}

void hidden_wait(int device, int64_t count) {
  const Guard guard(device);
  launch(count, blocks(count), stream_of(device));
  cudaStreamSynchronize(stream_of(device));
}

void hidden_copy(int device, int64_t count) {
  const Guard guard(device);
  int64_t on_host;
  cudaMemcpyAsync(&on_host, &count, sizeof count, cudaMemcpyDefault, stream_of(device));
  launch(count, blocks(count), stream_of(device));
}

void hidden_fill(int device, int64_t count) {
  const Guard guard(device);
  cudaMemsetAsync(nullptr, 0, 1024, stream_of(device));
  launch(count, blocks(count), stream_of(device));
}

void occupancy_asked(int device, int64_t count) {
  const Guard guard(device);
  int per_sm;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, fill, kThreads, 0);
  launch(count, blocks(count), stream_of(device));
}

}  // extern "C"
