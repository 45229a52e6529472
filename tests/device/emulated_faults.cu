// Kernels for the emulator's own tests: each primitive alone, and faults that the emulator must notice, each beside its clean twin.
#include "../../csrc/common/ptx.cuh"

#include <cstring>

#include <sys/mman.h>

using namespace peftops;

// What all of these kernels take.
struct Task {
  const void *a, *b;
  void* out;
  int64_t count;
  int planted;  // 0: the clean twin
};

namespace {

float* shared_floats() { return reinterpret_cast<float*>(shared_memory); }
int thread() { return static_cast<int>(threadIdx.x); }

// ---- primitives -------------------------------------------------------------------------------------------------------------------------

// a: 16-bit [blocks][count], put into shared memory; b: int64 [32], each lane's offset into it in elements; out: [blocks][32][4] registers.
template <bool kTransposed>
__global__ void load(const Task task) {
  const auto* from = static_cast<const uint16_t*>(task.a) + blockIdx.x * task.count;
  auto* elements = reinterpret_cast<uint16_t*>(shared_memory);
  for (int64_t i = thread(); i < task.count; i += blockDim.x) elements[i] = from[i];
  __syncthreads();
  uint32_t r[4];
  const uint16_t* row = elements + static_cast<const int64_t*>(task.b)[thread()];
  kTransposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  std::memcpy(static_cast<uint32_t*>(task.out) + (blockIdx.x * 32 + thread()) * 4, r, sizeof r);
}

// a: [blocks][32][4] registers; b: [blocks][32][2]; out: float32 [blocks][32][4], added to.
template <bool kBfloat16>
__global__ void multiply(const Task task) {
  const int64_t lane = blockIdx.x * 32 + thread();
  uint32_t a[4], b[2];
  float d[4];
  std::memcpy(a, static_cast<const uint32_t*>(task.a) + 4 * lane, sizeof a);
  std::memcpy(b, static_cast<const uint32_t*>(task.b) + 2 * lane, sizeof b);
  std::memcpy(d, static_cast<float*>(task.out) + 4 * lane, sizeof d);
  kBfloat16 ? mma_bfloat16(d, a, b) : mma_float16(d, a, b);
  std::memcpy(static_cast<float*>(task.out) + 4 * lane, d, sizeof d);
}

// out = a exchanged between lanes whose numbers differ by `count`.
__global__ void exchange(const Task task) {
  static_cast<float*>(task.out)[thread()] =
      __shfl_xor_sync(0xffffffffu, static_cast<const float*>(task.a)[thread()], static_cast<int>(task.count));
}

// out: int64 [blocks][threads][7]: each thread's own indices and sizes.
__global__ void indices(const Task task) {
  const int64_t block = blockIdx.x + gridDim.x * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  const int64_t at = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z), threads = blockDim.x * blockDim.y * blockDim.z;
  __syncthreads();  // others run in between
  const int64_t values[] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, threads};
  std::memcpy(static_cast<int64_t*>(task.out) + (block * threads + at) * 7, values, sizeof values);
}

// out: int64 [blocks], the place of each block in the order in which they ran; the counter is in `a`.
__global__ void order(const Task task) {
  if (thread() == 0) static_cast<int64_t*>(task.out)[blockIdx.x] = (*static_cast<int64_t*>(const_cast<void*>(task.a)))++;
}

// ---- faults -----------------------------------------------------------------------------------------------------------------------------

// out[i] = a[(i + count) % threads], or what the first warp has, or (count = 0) the first lane of the warp, through shared memory.
__global__ void missing_barrier(const Task task) {
  const int threads = static_cast<int>(blockDim.x), count = static_cast<int>(task.count);
  const int from = count > 0 ? (thread() + count) % threads : count < 0 ? thread() % 32 : thread() / 32 * 32;
  shared_floats()[thread()] = static_cast<const float*>(task.a)[thread()];
  if (!task.planted) __syncthreads();
  static_cast<float*>(task.out)[thread()] = shared_floats()[from];
}

// out[i] = a[(i + 32) % threads], twice over; the second round's stores come before others have read the first round's.
__global__ void missing_second_barrier(const Task task) {
  const int count = static_cast<int>(blockDim.x);
  for (int round = 0; round < 2; ++round) {
    shared_floats()[thread()] = static_cast<const float*>(task.a)[round * count + thread()];
    __syncthreads();
    static_cast<float*>(task.out)[round * count + thread()] = shared_floats()[(thread() + 32) % count];
    if (!task.planted) __syncthreads();
  }
}

// Every warp has its own scratch memory, or `planted` all have the same, in each of eight rounds.
__global__ void shared_scratch(const Task task) {
  float* const scratch = shared_floats() + (task.planted ? thread() % 32 : thread());
  float sum = 0.0f;
  for (int round = 0; round < 8; ++round) {
    __syncthreads();
    *scratch = static_cast<const float*>(task.a)[thread()];
    float zero = 0.0f;
    for (int i = 0; i < 8; ++i) zero = __shfl_xor_sync(0xffffffffu, zero, 1);
    sum += *scratch + zero;
  }
  static_cast<float*>(task.out)[thread()] = sum / 8;
}

// The sum of two tiles that lie in one buffer one after the other. Each is read first, long before the next is stored: `planted`, only
// that keeps them apart.
__global__ void overwritten_tile(const Task task) {
  const int threads = static_cast<int>(blockDim.x);
  float sum = 0.0f;
  for (int tile = 0; tile < 2; ++tile) {
    shared_floats()[thread()] = static_cast<const float*>(task.a)[tile * threads + thread()];
    __syncthreads();
    float value = shared_floats()[(thread() + 32) % threads];
    for (int i = 0; i < 64; ++i) value = __shfl_xor_sync(0xffffffffu, value, 1);
    sum += value;
    if (!task.planted) __syncthreads();
  }
  static_cast<float*>(task.out)[thread()] = sum;
}

__global__ void uninitialised_shared_memory(const Task task) {
  if (!task.planted || thread() != 5) shared_floats()[thread()] = static_cast<const float*>(task.a)[thread()];
  __syncthreads();
  static_cast<float*>(task.out)[thread()] = shared_floats()[thread()];
}

// out[i] = a[(i + 4) % threads] by a copy of four floats for each fourth thread, of which `planted` forgets to wait for its own (1), for
// the others' (2), or to close the group for which it waits (3).
__global__ void asynchronous_copy(const Task task) {
  const int threads = static_cast<int>(blockDim.x);
  const float* from = static_cast<const float*>(task.a) + thread();
  if (thread() % 4 == 0) cp_async_16(shared_floats() + thread(), from, true);
  if (task.planted != 3) cp_async_commit();
  if (task.planted != 1) cp_async_wait<0>();
  if (task.planted != 2) __syncthreads();
  static_cast<float*>(task.out)[thread()] = shared_floats()[(thread() + 4) % threads];
}

// out[i] = a[i] + a[threads + i] + ... over `count` tiles in three stages, of which each is sent two tiles ahead; `planted`: three, into
// the stage that is being read.
__global__ void pipelined_copies(const Task task) {
  const int threads = static_cast<int>(blockDim.x), count = static_cast<int>(task.count), ahead = task.planted ? 3 : 2;
  const auto send = [&](int tile) {
    if (thread() % 4 == 0 && tile < count)
      cp_async_16(shared_floats() + tile % 3 * threads + thread(), static_cast<const float*>(task.a) + tile * threads + thread(), true);
    cp_async_commit();
  };
  for (int tile = 0; tile < ahead; ++tile) send(tile);
  float sum = 0.0f;
  for (int tile = 0; tile < count; ++tile) {
    cp_async_wait<1>();
    __syncthreads();
    send(tile + ahead);
    sum += shared_floats()[tile % 3 * threads + (thread() + 32) % threads];
  }
  static_cast<float*>(task.out)[thread()] = sum;
}

// Zeros where a copy has no source; `planted`: a destination (1) or a source (2) that is not on 16 bytes, or a destination elsewhere (3).
__global__ void copy_of_nothing(const Task task) {
  float* const to = shared_floats() + (thread() & ~3) + (task.planted == 1);
  const float* const from = static_cast<const float*>(task.a) + (task.planted == 2);
  cp_async_16(task.planted == 3 ? static_cast<float*>(task.out) : to, from, false);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  static_cast<float*>(task.out)[thread()] = shared_floats()[thread()];
}

__global__ void read_past_shared_memory(const Task task) {
  shared_floats()[thread()] = static_cast<const float*>(task.a)[thread()];
  __syncthreads();
  static_cast<float*>(task.out)[thread()] = shared_floats()[thread() + (task.planted ? 32 : 0)];
}

// `planted` floats past what it asked for.
__global__ void write_past_shared_memory(const Task task) {
  shared_floats()[thread() + task.planted] = static_cast<const float*>(task.a)[thread()];
  static_cast<float*>(task.out)[thread()] = shared_floats()[thread() + task.planted];
}

__global__ void write_past_the_output(const Task task) {
  if (thread() < task.count || task.planted)
    static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread() % task.count];
}

__global__ void write_through_null(const Task task) {
  static_cast<float*>(task.planted ? nullptr : task.out)[thread()] = static_cast<const float*>(task.a)[thread()];
}

__global__ void divergent_barrier(const Task task) {
  if (!task.planted || thread() < 16) __syncthreads();
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread()];
}

// Whole warps return early.
__global__ void return_before_barrier(const Task task) {
  if (task.planted && thread() >= 32) return;
  __syncthreads();
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread()];
}

__global__ void divergent_shuffle(const Task task) {
  float value = static_cast<const float*>(task.a)[thread()];
  if (!task.planted || thread() % 32 < 8) value = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, value, 3), 3);
  static_cast<float*>(task.out)[thread()] = value;
}

// Some lanes of a warp load while others exchange.
__global__ void different_collectives(const Task task) {
  float value = static_cast<const float*>(task.a)[thread()];
  if (task.planted && thread() % 2) {
    uint32_t r[4];
    ldmatrix_x4(r, shared_memory);
  } else {
    value = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, value, 3), 3);
  }
  static_cast<float*>(task.out)[thread()] = value;
}

__global__ void partial_mask(const Task task) {
  const float value = __shfl_xor_sync(task.planted ? 0xffffu : 0xffffffffu, static_cast<const float*>(task.a)[thread()], 1);
  static_cast<float*>(task.out)[thread()] = __shfl_xor_sync(0xffffffffu, value, 1);
}

// A row of a matrix that starts 8 bytes off.
__global__ void misaligned_matrix_row(const Task task) {
  shared_floats()[thread()] = static_cast<const float*>(task.a)[thread()];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory + (task.planted && thread() == 9 ? 8 : 0));
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread()] + static_cast<float>(r[0] - r[0]);
}

__global__ void matrix_row_elsewhere(const Task task) {
  shared_floats()[thread()] = static_cast<const float*>(task.a)[thread()];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, task.planted ? static_cast<const void*>(task.a) : shared_memory);
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread()] + static_cast<float>(r[0] - r[0]);
}

// A load of 16 bytes from an address that is a multiple of 4.
__global__ void misaligned_load(const Task task) {
  const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(task.a) + (task.planted ? 1 : 4));
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread()] + four.x * 0.0f;
}

// The row of a matrix of `count` columns in 32 bits.
__global__ void overflowing_offset(const Task task) {
  const int columns = static_cast<int>(task.count);
  const int64_t offset = task.planted ? int64_t{thread() * columns} : thread() * task.count;
  static_cast<float*>(task.out)[thread()] = offset < 0 ? 0.0f : static_cast<const float*>(task.a)[thread()];
}

__global__ void division_by_zero(const Task task) {
  const int64_t divisor = task.planted ? thread() - 7 : 1;
  static_cast<float*>(task.out)[thread()] = static_cast<const float*>(task.a)[thread() / divisor * divisor];
}

struct Named {
  const char* name;
  void (*kernel)(Task);
};

constexpr Named kKernels[] = {
    {"load", load<false>},
    {"load_trans", load<true>},
    {"multiply_bfloat16", multiply<true>},
    {"multiply_float16", multiply<false>},
    {"exchange", exchange},
    {"indices", indices},
    {"order", order},
    {"missing_barrier", missing_barrier},
    {"missing_second_barrier", missing_second_barrier},
    {"shared_scratch", shared_scratch},
    {"overwritten_tile", overwritten_tile},
    {"uninitialised_shared_memory", uninitialised_shared_memory},
    {"asynchronous_copy", asynchronous_copy},
    {"pipelined_copies", pipelined_copies},
    {"copy_of_nothing", copy_of_nothing},
    {"read_past_shared_memory", read_past_shared_memory},
    {"write_past_shared_memory", write_past_shared_memory},
    {"write_past_the_output", write_past_the_output},
    {"write_through_null", write_through_null},
    {"divergent_barrier", divergent_barrier},
    {"return_before_barrier", return_before_barrier},
    {"divergent_shuffle", divergent_shuffle},
    {"different_collectives", different_collectives},
    {"partial_mask", partial_mask},
    {"misaligned_matrix_row", misaligned_matrix_row},
    {"matrix_row_elsewhere", matrix_row_elsewhere},
    {"misaligned_load", misaligned_load},
    {"overflowing_offset", overflowing_offset},
    {"division_by_zero", division_by_zero},
};

}  // namespace

extern "C" {

// Launches a kernel by name with `threads` threads in x; the status.
int emulated_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared_memory_bytes, const Task* task) {
  for (const Named& known : kKernels) {
    if (std::strcmp(known.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid[0], grid[1], grid[2]);
    config.blockDim = dim3(block[0], block[1], block[2]);
    config.dynamicSmemBytes = shared_memory_bytes;
    struct {
      Task task;
      unsigned char rest[1024];  // the emulator copies more than the struct
    } argument{*task, {}};
    void* arguments[] = {&argument};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(known.kernel), arguments);
  }
  return -1;
}

// Memory of whole pages before one that cannot be touched.
void* emulated_memory(size_t bytes) {
  const size_t page = 4096, inner = (bytes + page - 1) / page * page;
  auto* all = static_cast<unsigned char*>(mmap(nullptr, inner + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(all + inner, page, PROT_NONE);
  return all + inner - bytes;
}
}
