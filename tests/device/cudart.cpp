// Stands in for the CUDA runtime (libcudart.so.13) where there is no GPU. Every call is recorded. A launch of a kernel that nvcc compiled
// stops there: it has been registered, with its name. Any other function is a kernel for the host, which the emulator runs.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
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
constexpr unsigned kMaxCluster = 8;
constexpr size_t kMaxArgument = 4096;  // of a kernel; what lies behind a smaller one comes along

// As recording.py reads it.
struct Record {
  const char* call;
  const char* kernel;  // mangled; nullptr where the call has none
  int32_t device;      // current one
  int32_t status;
  void* stream;
  uint32_t grid[3], block[3], cluster[3];
  int32_t programmatic;    // whether it may start before the launch before it has ended
  uint64_t shared_memory;  // of a launch, or as opted in
  unsigned char argument[kMaxArgument];
};

// What stands in a tensor map, as recording.py reads it.
struct TensorMap {
  char magic[4];
  uint8_t type, rank, swizzle, fill;
  uint64_t address;
  uint64_t sizes[5], strides[4];  // the first stride is the second dimension's, in bytes
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

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
bool old_driver = false;  // one that makes no tensor maps
std::unordered_map<int, std::unordered_map<const void*, size_t>> opted_in;  // by device and function
std::string failure = "unspecified launch failure";
thread_local int current = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  void* stream;
  dim3 cluster{1, 1, 1};
  bool programmatic = false;
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
cudaError_t check_launch(const void* function, const Configuration& how) {
  const auto& [grid, block, shared_memory, stream, cluster, programmatic] = how;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, together = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (together == 0 || together > kMaxCluster || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return cudaErrorInvalidClusterSize;
  if ((together > 1 || programmatic) && devices[static_cast<size_t>(current)].sm < 90) return cudaErrorNotSupported;
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
    const auto note = [](uint32_t (&to)[3], dim3 from) { to[0] = from.x, to[1] = from.y, to[2] = from.z; };
    note(record.grid, how.grid);
    note(record.block, how.block);
    note(record.cluster, how.cluster);
    record.programmatic = how.programmatic;
    record.shared_memory = how.shared_memory;
    if (arguments && arguments[0]) std::memcpy(record.argument, arguments[0], sizeof record.argument);
    record.status = check_launch(function, how);
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

// What the driver makes a tensor map of, or refuses (CUDA driver API, tensor map object management).
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool whole =
      type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!whole || rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;
  constexpr unsigned kBytes = 2, kLine[] = {256 * kBytes, 32, 64, 128};  // of an element; of a box's line, by swizzle
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(address) % 16) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * kBytes % 16 || box[0] * kBytes > kLine[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap made{};
  std::memcpy(made.magic, "TMA", 4);
  made.type = static_cast<uint8_t>(type), made.rank = static_cast<uint8_t>(rank);
  made.swizzle = static_cast<uint8_t>(swizzle), made.fill = static_cast<uint8_t>(fill);
  made.address = reinterpret_cast<uint64_t>(address);
  std::copy_n(sizes, rank, made.sizes);
  std::copy_n(strides, rank - 1, made.strides);
  std::copy_n(box, rank, made.box);
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
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
  Configuration how{config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& [id, pad, value] = config->attrs[i];
    if (id == cudaLaunchAttributeClusterDimension) how.cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
    if (id == cudaLaunchAttributeProgrammaticStreamSerialization) how.programmatic = value.programmaticStreamSerializationAllowed != 0;
  }
  return launch("cudaLaunchKernelExC", function, how, arguments);
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

// ---- the driver -------------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled" && version >= 12000 && !old_driver;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
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

void cudart_set_old_driver(int old) { old_driver = old != 0; }

void cudart_set_emulator_seed(uint64_t seed) { emulator::set_seed(seed); }

}  // extern "C"
