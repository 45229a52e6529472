// Stands in for the CUDA runtime (libcudart.so.13) where there is no GPU. Every call is recorded. A launch of a kernel that nvcc compiled
// stops there: it has been registered, with its name. Any other function is a kernel for the host, which the emulator runs.
#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

#include "emulator.h"

namespace {

constexpr int kMaxDevices = 16;
constexpr size_t kDefaultShared = 48 * 1024;  // dynamic shared memory without opt-in
constexpr unsigned kMaxBlock = 1024, kMaxBlockZ = 64, kMaxGridX = 2147483647, kMaxGridYZ = 65535;

// As recording.py reads it.
struct Record {
  const char* call;
  const char* kernel;  // mangled; nullptr where the call has none
  int32_t device;      // current one
  int32_t status;
  void* stream;
  uint32_t grid[3], block[3];
  uint64_t shared_memory;  // of a launch, or as opted in
  unsigned char argument[emulator::kArgumentBytes];
};

struct Device {
  int sm = 80, sm_count = 108, shared_memory = 163 * 1024;  // shared memory of a block with opt-in
};

std::mutex mutex;  // guards all of this
std::deque<Record> records;
std::unordered_map<const void*, std::string> registered;
std::unordered_map<std::string, const char*> names;  // of kernels for the host
std::set<std::string> interned;
std::array<Device, kMaxDevices> devices;
int device_count = 2;
std::unordered_map<int, std::unordered_map<const void*, size_t>> opted_in;  // by device and function
std::string failure = "unspecified launch failure";
thread_local int current = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  void* stream;
};
thread_local Configuration pushed;

cudaError_t noted(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

Record blank(const char* call) {
  Record record{};
  record.call = call;
  record.device = current;
  return record;
}

const char* kernel_name(const void* function) {
  const auto known = registered.find(function);
  if (known != registered.end()) return known->second.c_str();
  return interned.insert(emulator::name_of(function)).first->c_str();
}

// What the runtime itself refuses.
cudaError_t check_launch(const void* function, dim3 grid, dim3 block, size_t shared_memory) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ || threads == 0 ||
      threads > kMaxBlock || block.z > kMaxBlockZ)
    return cudaErrorInvalidConfiguration;
  auto& functions = opted_in[current];
  const auto found = functions.find(function);
  return shared_memory > (found == functions.end() ? kDefaultShared : found->second) ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t launch(const char* call, const void* function, Configuration how, void** arguments) {
  Record* made;
  bool on_host;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Record record = blank(call);
    record.kernel = kernel_name(function);
    record.stream = how.stream;
    const unsigned grid[] = {how.grid.x, how.grid.y, how.grid.z}, block[] = {how.block.x, how.block.y, how.block.z};
    std::memcpy(record.grid, grid, sizeof grid);
    std::memcpy(record.block, block, sizeof block);
    record.shared_memory = how.shared_memory;
    if (arguments && arguments[0]) std::memcpy(record.argument, arguments[0], sizeof record.argument);
    record.status = check_launch(function, how.grid, how.block, how.shared_memory);
    records.push_back(record);
    made = &records.back();
    on_host = registered.find(function) == registered.end();
  }
  if (made->status != cudaSuccess || !on_host) return noted(static_cast<cudaError_t>(made->status));
  const std::string wrong = emulator::run(function, how.grid, how.block, how.shared_memory, arguments[0]);
  if (wrong.empty()) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  failure = wrong;
  made->status = cudaErrorLaunchFailure;
  return noted(cudaErrorLaunchFailure);
}

}  // namespace

extern "C" {

// ---- what nvcc's code calls -------------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  const std::lock_guard<std::mutex> lock(mutex);
  registered[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void* stream) {
  pushed = {grid, block, shared_memory, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_memory = pushed.shared_memory;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_memory, cudaStream_t stream) {
  return launch("<<<>>>", kernel, {grid, block, shared_memory, stream}, arguments);
}

// ---- launches ---------------------------------------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_memory, cudaStream_t stream) {
  return launch("cudaLaunchKernel", function, {grid, block, shared_memory, stream}, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch("cudaLaunchKernelExC", function, {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream}, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  Record record = blank("cudaFuncSetAttribute");
  record.kernel = kernel_name(function);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    record.shared_memory = static_cast<uint64_t>(value);
    if (value < 0 || value > devices[static_cast<size_t>(current)].shared_memory)
      record.status = cudaErrorInvalidValue;
    else
      opted_in[current][function] = static_cast<size_t>(value);
  }
  records.push_back(record);
  return noted(static_cast<cudaError_t>(record.status));
}

// ---- devices ----------------------------------------------------------------------------------------------------------------------------

cudaError_t cudaSetDevice(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const bool known = device >= 0 && device < device_count;
  if (known) current = device;
  Record record = blank("cudaSetDevice");
  record.status = known ? cudaSuccess : cudaErrorInvalidDevice;
  records.push_back(record);
  return noted(static_cast<cudaError_t>(record.status));
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= device_count) return noted(cudaErrorInvalidDevice);
  const Device& facts = devices[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = facts.sm / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = facts.sm % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = facts.sm_count; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = facts.shared_memory; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kDefaultShared; return cudaSuccess;
    default: return noted(cudaErrorInvalidValue);  // nobody has asked for it so far
  }
}

// ---- errors -----------------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "another CUDA error";
  }
}

const char* cudaGetErrorString(cudaError_t status) { return status == cudaErrorLaunchFailure ? failure.c_str() : cudaGetErrorName(status); }

// ---- what no operator may do: allocate, copy, wait, ask the occupancy at run time
// --------------------------------------------------------

#define PEFTOPS_NOT_ALLOWED(name, parameters)      \
  cudaError_t name parameters {                    \
    const std::lock_guard<std::mutex> lock(mutex); \
    records.push_back(blank(#name));               \
    return cudaSuccess;                            \
  }
PEFTOPS_NOT_ALLOWED(cudaFree, (void*))
PEFTOPS_NOT_ALLOWED(cudaFreeAsync, (void*, cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaFreeHost, (void*))
PEFTOPS_NOT_ALLOWED(cudaMemcpy, (void*, const void*, size_t, cudaMemcpyKind))
PEFTOPS_NOT_ALLOWED(cudaMemcpyAsync, (void*, const void*, size_t, cudaMemcpyKind, cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaMemcpy2D, (void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind))
PEFTOPS_NOT_ALLOWED(cudaMemcpy2DAsync, (void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaMemcpyToSymbol, (const void*, const void*, size_t, size_t, cudaMemcpyKind))
PEFTOPS_NOT_ALLOWED(cudaMemcpyFromSymbol, (void*, const void*, size_t, size_t, cudaMemcpyKind))
PEFTOPS_NOT_ALLOWED(cudaMemset, (void*, int, size_t))
PEFTOPS_NOT_ALLOWED(cudaMemsetAsync, (void*, int, size_t, cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaDeviceSynchronize, ())
PEFTOPS_NOT_ALLOWED(cudaStreamSynchronize, (cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaStreamQuery, (cudaStream_t))
PEFTOPS_NOT_ALLOWED(cudaEventSynchronize, (cudaEvent_t))
PEFTOPS_NOT_ALLOWED(cudaEventQuery, (cudaEvent_t))
#undef PEFTOPS_NOT_ALLOWED

// These also give something back: an address that nothing may be read from or written to.
#define PEFTOPS_NO_MEMORY(name, parameters)                     \
  cudaError_t name parameters {                                 \
    const std::lock_guard<std::mutex> lock(mutex);              \
    records.push_back(blank(#name));                            \
    *pointer = reinterpret_cast<void*>(uintptr_t{0xdead0000u}); \
    return cudaSuccess;                                         \
  }
PEFTOPS_NO_MEMORY(cudaMalloc, (void** pointer, size_t))
PEFTOPS_NO_MEMORY(cudaMallocAsync, (void** pointer, size_t, cudaStream_t))
PEFTOPS_NO_MEMORY(cudaMallocHost, (void** pointer, size_t))
PEFTOPS_NO_MEMORY(cudaMallocManaged, (void** pointer, size_t, unsigned))
PEFTOPS_NO_MEMORY(cudaHostAlloc, (void** pointer, size_t, unsigned))
#undef PEFTOPS_NO_MEMORY

// What cudaOccupancyMaxActiveBlocksPerMultiprocessor is in a .cu file.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  const std::lock_guard<std::mutex> lock(mutex);
  records.push_back(blank("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"));
  *blocks = 1;
  return cudaSuccess;
}

// ---- what tests ask for -----------------------------------------------------------------------------------------------------------------

size_t cudart_record_bytes() { return sizeof(Record); }

size_t cudart_record_count() {
  const std::lock_guard<std::mutex> lock(mutex);
  return records.size();
}

// Valid until the records are cleared.
const void* cudart_record(size_t index) {
  const std::lock_guard<std::mutex> lock(mutex);
  return &records.at(index);
}

// Starts a new recording; opt-ins stay, as they would.
void cudart_clear_records() {
  const std::lock_guard<std::mutex> lock(mutex);
  records.clear();
}

// Makes all devices such a GPU, on which nothing has been opted in.
void cudart_set_devices(int count, int sm, int sm_count, int shared_memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  device_count = count;
  devices.fill({sm, sm_count, shared_memory});
  opted_in.clear();
}

void cudart_set_emulator_seed(uint64_t seed) { emulator::set_seed(seed); }

}  // extern "C"
