// Kernels with one fault each, for test_kernels.py: the gates must name every one of them, and none that is `clean`.
#include <cstdint>

namespace peftops::planted {

struct Task {
  const float* in;
  float* out;
  int64_t count;
};

#define KERNEL __global__ void __launch_bounds__(128)

KERNEL clean(Task task) { task.out[threadIdx.x] = task.in[threadIdx.x] + 1.0f; }
// The same work under another name, elsewhere and in a namespace that the compiler names; then with another constant.
namespace {
KERNEL clean_twin(Task task) { task.out[threadIdx.x] = task.in[threadIdx.x] + 1.0f; }
}  // namespace
const void* kept() { return reinterpret_cast<const void*>(&clean_twin); }
KERNEL clean_other(Task task) { task.out[threadIdx.x] = task.in[threadIdx.x] + 2.0f; }
KERNEL clean_wide(Task task) { reinterpret_cast<float4*>(task.out)[threadIdx.x] = reinterpret_cast<const float4*>(task.in)[threadIdx.x]; }
KERNEL clean_reduction(Task task) {
  float sum = task.in[threadIdx.x];
  for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  const unsigned all = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(sum));
  task.out[threadIdx.x] = sum + static_cast<float>(all);
}
KERNEL clean_product(Task task) {
  float d[4] = {};
  const unsigned a = threadIdx.x;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a));
  task.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
KERNEL atomic_by_name(Task task) { atomicAdd(task.out, 1.0f); }

#ifdef FAULTS
// Two blocks of 1024 threads leave 32 registers.
__global__ void __launch_bounds__(1024, 2) spills(Task task) {
  float value[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) value[i] = task.in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) task.out[i * 1024 + threadIdx.x] = value[i] * value[63 - i];
}
KERNEL indexes_an_array(Task task) {
  float value[32] = {};
  for (int64_t i = 0; i < task.count; ++i) value[static_cast<int>(task.in[i]) & 31] += 1.0f;
  for (int i = 0; i < 32; ++i) task.out[i] = value[i];
}
KERNEL warned_about(Task task) {
  int unused;
  task.out[threadIdx.x] = 0.0f;
}
KERNEL adds_in_any_order(Task task) { atomicAdd(task.out, task.in[threadIdx.x]); }
KERNEL in_double(Task task) { task.out[threadIdx.x] = static_cast<float>(task.in[threadIdx.x] * 1.1); }
KERNEL divides(Task task) { task.out[static_cast<int64_t>(task.in[0]) / task.count] = 0.0f; }
__global__ void without_bounds(Task task) { task.out[threadIdx.x] = 0.0f; }
#endif

#ifdef TWICE
// Its short name is that of another kernel.
namespace peftops {
KERNEL clean(Task task) { task.out[threadIdx.x] = task.in[threadIdx.x] + 3.0f; }
}  // namespace peftops
#endif

#ifdef SERIALIZED
// The sums of a product in flight are changed before it is waited for.
KERNEL serialized(Task task) {
  float d[4] = {};
  const uint64_t tile = static_cast<uint64_t>(task.count);
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(tile));
    d[0] += 1.0f;
  }
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  task.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
#endif

}  // namespace peftops::planted
