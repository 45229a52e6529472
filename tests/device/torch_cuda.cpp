// Makes a CPU build of torch behave as a CUDA build: tensors whose device is cuda:N and whose memory is the host's. Allocator, device
// guard, streams, hooks, the copy between devices, and every other operator by its CPU kernel on the same memory. Which device is current
// is the CUDA runtime's to say (cudart.cpp stands in for it), so that it sees what an operator does.
//
// Memory: each block ends within 15 bytes of a page that nobody may touch, so a kernel that reads or writes past the end stops right
// there. Blocks start at multiples of 16 bytes only, the widest access of a kernel (CUDA's start at 512): with more, the end would be
// further from the page. New blocks and freed ones are full of NaN; what is written around a block or into a freed one is found out later.
//
// Recording mode: blocks are address space without memory, of any size, and operators only work out shapes.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

extern "C" {
int cudaSetDevice(int device);
int cudaGetDevice(int* device);
int cudaGetDeviceCount(int* count);
}

namespace {

bool recording = false;

c10::DeviceIndex current_device() {
  int device = -1;
  TORCH_CHECK(cudaGetDevice(&device) == 0, "cudaGetDevice failed");
  return static_cast<c10::DeviceIndex>(device);
}

c10::DeviceIndex device_count() {
  int count = 0;
  cudaGetDeviceCount(&count);
  return static_cast<c10::DeviceIndex>(count);
}

// ---- memory -----------------------------------------------------------------------------------------------------------------------------

constexpr size_t kPage = 4096, kAlignment = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
constexpr size_t kRested = 32;  // freed blocks of a size before the first of them is used again
constexpr size_t kKept = 1 << 20;  // larger ones go back to the system

struct Block {
  char* mapping;
  size_t mapped, bytes;
  bool backed;

  char* begin() const { return mapping + kPage; }
  char* end() const { return mapping + mapped - kPage; }  // the untouchable page
  char* start() const { return end() - (bytes + kAlignment - 1) / kAlignment * kAlignment; }
};

bool untouched(const char* from, const char* to) {
  return from == to ||
         (static_cast<unsigned char>(*from) == kPoison && std::memcmp(from, from + 1, static_cast<size_t>(to - from) - 1) == 0);
}

void poison(char* from, char* to) { std::memset(from, kPoison, static_cast<size_t>(to - from)); }

class Memory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::kCUDA, current_device());
    if (bytes == 0) return {nullptr, device};
    const std::lock_guard<std::mutex> lock(mutex_);
    Block* block = recording ? mapped(bytes) : rested(bytes);
    TORCH_CHECK(block, "no memory for ", bytes, " bytes on ", device);
    block->bytes = bytes;
    live_.insert(block);
    return {block->start(), block, &Memory::free, device};
  }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  // What was written where no block is since the last call.
  std::string damage() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block* block : live_) inspect(*block);
    for (const auto& [bytes, blocks] : freed_)
      for (const Block* block : blocks) inspect_freed(*block);
    return std::exchange(damage_, {});
  }

  size_t live() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return live_.size();
  }

  static Memory& instance() {
    static auto* memory = new Memory;  // outlives the last tensor
    return *memory;
  }

 private:
  static size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage + 2 * kPage; }

  static Block* mapped(size_t bytes) {
    void* mapping = mmap(nullptr, pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    auto* block = new Block{static_cast<char*>(mapping), pages(bytes), bytes, !recording};
    if (!block->backed) return block;
    if (mprotect(block->begin(), block->mapped - 2 * kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
    poison(block->begin(), block->end());
    return block;
  }

  // The block of this size that was freed first, if enough were freed after it. Tests make a million small tensors: no system calls here.
  Block* rested(size_t bytes) {
    const auto found = freed_.find(pages(bytes));
    if (found == freed_.end() || found->second.size() < kRested) return mapped(bytes);
    Block* block = found->second.front();
    found->second.pop_front();
    inspect_freed(*block);
    return block;
  }

  static void free(void* context) {
    auto* block = static_cast<Block*>(context);
    Memory& memory = instance();
    const std::lock_guard<std::mutex> lock(memory.mutex_);
    memory.inspect(*block);
    memory.live_.erase(block);
    if (block->backed && block->mapped <= kKept) {
      poison(block->begin(), block->end());
      memory.freed_[block->mapped].push_back(block);
      return;
    }
    munmap(block->mapping, block->mapped);
    delete block;
  }

  void inspect(const Block& block) {
    if (!block.backed) return;
    inspect(block, "before", block.begin(), block.start());
    inspect(block, "behind", block.start() + block.bytes, block.end());
  }

  void inspect_freed(const Block& block) { inspect(block, "after the end of the life of", block.begin(), block.end()); }

  void inspect(const Block& block, const char* where, char* from, char* to) {
    if (untouched(from, to)) return;
    damage_ += std::string("written ") + where + " a block of " + std::to_string(block.bytes) + " bytes\n";
    poison(from, to);
  }

  std::mutex mutex_;
  std::unordered_set<Block*> live_;
  std::unordered_map<size_t, std::deque<Block*>> freed_;  // by mapped bytes
  std::string damage_;
};

struct RegisterMemory {
  RegisterMemory() { c10::SetAllocator(c10::kCUDA, &Memory::instance()); }
} register_memory;

// ---- devices and streams ----------------------------------------------------------------------------------------------------------------

constexpr int kMaxDevices = 16;
thread_local std::array<int64_t, kMaxDevices> current_stream{};  // a stream's id is its handle

struct HostGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device()}; }
  // As in CUDA builds, the runtime is only asked where something changes.
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() == current_device() || cudaSetDevice(device.index()) == 0, "there is no device ", device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() != current_device()) cudaSetDevice(device.index());
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream.at(static_cast<size_t>(device.index())));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_stream.at(static_cast<size_t>(stream.device_index())) = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  // Nothing runs behind anybody's back here, so an event has nothing to wait for.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, HostGuard)

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // the name under which torch asks for it
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex current_device() const override { return ::current_device(); }
  DeviceIndex getCurrentDevice() const override { return ::current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { HostGuard{}.setDevice({kCUDA, device}); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return HostGuard{}.exchangeDevice({kCUDA, device}).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return device < 0 ? ::current_device() : exchangeDevice(device); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

// ---- operators --------------------------------------------------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kCudaKeys(c10::DispatchKey::CUDA);

at::Tensor filled(at::Tensor t) {
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) at::native::fill_empty_deterministic_(t);
  return t;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return filled(at::detail::empty_generic(size, &Memory::instance(), kCudaKeys, c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return filled(at::detail::empty_strided_generic(size, stride, &Memory::instance(), kCudaKeys, c10::dtype_or_default(dtype)));
}

// One operator call: its CUDA tensors as tensors of another backend on the same storages, and back. That backend is the CPU, or, while
// recording, Meta.
class Call {
 public:
  void in(c10::IValue& value) {
    if (value.isTensor()) {
      value = stand_in(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (at::Tensor& t : list) t = stand_in(t);
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(stand_in(*t)) : t);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = value.toDevice();
      value = backend_;
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      value = stand_in(value.toStorage());
    }
  }

  // What the call did to the geometry of its arguments: resize_ and set_.
  void finish() {
    for (const auto& [stand_in, original] : tensors_) {
      if (!original.is_cuda()) continue;
      at::TensorImpl* to = original.unsafeGetTensorImpl();
      const c10::Storage& now = stand_in->storage();
      if (!storages_.count(now.unsafeGetStorageImpl()))
        storages_.emplace(now.unsafeGetStorageImpl(), Twin{now, moved(now), now.data(), now.nbytes()});
      Twin& twin = storages_.at(now.unsafeGetStorageImpl());
      if (twin.alias.nbytes() != twin.bytes || twin.alias.data() != twin.data) {
        c10::Storage fresh = moved(twin.alias);
        twin.original.set_data_ptr_noswap(std::move(fresh.mutable_data_ptr()));
        twin.original.set_nbytes(fresh.nbytes());
        twin.bytes = twin.alias.nbytes(), twin.data = twin.alias.data();
      }
      if (!original.storage().is_alias_of(twin.original)) to->set_storage_keep_dtype(twin.original);
      if (original.sizes() == stand_in->sizes() && original.strides() == stand_in->strides() &&
          original.storage_offset() == stand_in->storage_offset())
        continue;
      to->set_sizes_and_strides(stand_in->sizes(), stand_in->strides(), stand_in->storage_offset());
    }
  }

  void out(c10::IValue& value) {
    if (value.isTensor()) {
      value = returned(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (at::Tensor& t : list) t = returned(t);
      value = list;
    }
  }

  bool mixes_devices() const { return on_two_ || (device_ && on_host_); }

  c10::DispatchKeySet keys() const { return c10::DispatchKeySet(recording ? c10::DispatchKey::Meta : c10::DispatchKey::CPU); }

 private:
  // A storage of the backend, the CUDA storage it stands for, and where its memory was.
  struct Twin {
    c10::Storage alias, original;
    const void* data;
    size_t bytes;
  };

  at::Tensor stand_in(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      on_host_ = on_host_ || t.dim() > 0;
      tensors_.emplace(t.unsafeGetTensorImpl(), t);
      return t;
    }
    on_two_ = on_two_ || (device_ && *device_ != t.device());
    device_ = device_.value_or(t.device());
    at::Tensor alias = at::detail::make_tensor<at::TensorImpl>(stand_in(t.storage()), keys(), t.dtype());
    views_.emplace(alias.storage().unsafeGetStorageImpl(), t.key_set());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    tensors_.emplace(alias.unsafeGetTensorImpl(), t);
    kept_.push_back(alias);
    return alias;
  }

  c10::Storage stand_in(const c10::Storage& original) {
    c10::Storage& alias = aliases_[original.unsafeGetStorageImpl()];
    if (!alias) {
      void* data = recording ? nullptr : const_cast<void*>(original.data());
      alias =
          c10::Storage(c10::Storage::use_byte_size_t(), original.nbytes(), c10::DataPtr(data, backend_), c10::GetAllocator(backend_.type()),
                       /*resizable=*/true);
      storages_.emplace(alias.unsafeGetStorageImpl(), Twin{alias, original, data, original.nbytes()});
    }
    return alias;
  }

  // A CUDA storage with the bytes of one of the backend.
  c10::Storage moved(const c10::Storage& from) const {
    const c10::OptionalDeviceGuard guard(device_);
    c10::Storage to(c10::Storage::use_byte_size_t(), from.nbytes(), &Memory::instance(), /*resizable=*/true);
    if (!recording && from.nbytes()) std::memcpy(to.mutable_data(), from.data(), from.nbytes());
    return to;
  }

  at::Tensor returned(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (const auto found = tensors_.find(t.unsafeGetTensorImpl()); found != tensors_.end()) return found->second;
    if (!device_) return t;
    TORCH_CHECK(t.layout() == at::kStrided, "the stand-in has strided tensors only");
    const c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
    const auto base = views_.find(storage);
    at::Tensor result = base == views_.end()
                            ? at::detail::make_tensor<at::TensorImpl>(moved(t.storage()), kCudaKeys, t.dtype())
                            : at::detail::make_tensor<at::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storages_.at(storage).original),
                                                                      base->second, t.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return result;
  }

  const c10::Device backend_ = recording ? c10::Device(c10::kMeta) : c10::Device(c10::kCPU);
  std::optional<c10::Device> device_;
  bool on_two_ = false, on_host_ = false;  // CUDA tensors on another device than the first one; tensors that are no scalars on the host
  std::unordered_map<const c10::StorageImpl*, c10::Storage> aliases_;  // by CUDA storage
  std::unordered_map<const c10::StorageImpl*, Twin> storages_;  // by storage of the backend
  std::unordered_map<const c10::StorageImpl*, c10::DispatchKeySet> views_;  // keys of the tensors that a result may be a view of
  std::unordered_map<const at::TensorImpl*, at::Tensor> tensors_;  // arguments by what stands for them
  std::vector<at::Tensor> kept_;
};

void by_another_backend(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Only torch's own operators: else a CPU kernel would pass for a CUDA kernel that is missing.
  TORCH_CHECK(op.schema().name().rfind("aten::", 0) == 0, op.schema().operator_name(), " has no CUDA kernel");
  const at::AutoDispatchBelowADInplaceOrView guard;
  Call call;
  for (auto value = stack->end() - static_cast<std::ptrdiff_t>(op.schema().arguments().size()); value != stack->end(); ++value)
    call.in(*value);
  // CUDA builds refuse it as well, except to copy, and to index by what is on the host.
  const std::string& name = op.schema().name();
  TORCH_CHECK(!call.mixes_devices() || name == "aten::copy_" || name.find("index") != std::string::npos, name,
              ": Expected all tensors to be on the same device");
  op.redispatchBoxed(call.keys(), stack);
  call.finish();
  for (auto value = stack->end() - static_cast<std::ptrdiff_t>(op.schema().returns().size()); value != stack->end(); ++value)
    call.out(*value);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_another_backend>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  // Its composite kernel asks for a CUDA one.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&by_another_backend>());
}

}  // namespace

// ---- what tests ask for -----------------------------------------------------------------------------------------------------------------

extern "C" {

void torch_cuda_record(int on) { recording = on != 0; }

// The handle of the calling thread's current stream on a device.
void torch_cuda_set_stream(int device, int64_t handle) { current_stream.at(static_cast<size_t>(device)) = handle; }

// The shim that only CUDA builds of torch have.
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(current_stream.at(static_cast<size_t>(device)));
  return 0;
}

size_t torch_cuda_live_blocks() { return Memory::instance().live(); }

// What was written around blocks since the last call; empty if nothing was. Valid until the next call.
const char* torch_cuda_damage() {
  static std::string text;
  text = Memory::instance().damage();
  return text.c_str();
}
}
