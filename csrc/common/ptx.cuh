// Instructions that C++ has no words for. Compiled for the host, the warp-wide ones are declared only, for whoever runs kernels there.
#pragma once

#include <cuda_runtime.h>

#include "numeric.h"

#ifdef __CUDACC__
extern __shared__ __align__(128) unsigned char shared_memory[];
#else
extern unsigned char* shared_memory;  // a pointer, so that each block's can end where memory ends
#endif

namespace peftops {

#ifdef __CUDACC__
#define PEFTOPS_DEVICE static __forceinline__ __device__
#define PEFTOPS_MEMBER __forceinline__ __device__

PEFTOPS_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and gets the elements (l / 4, 2 (l % 4))
// and (l / 4, 2 (l % 4) + 1) of each.
PEFTOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
PEFTOPS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// D += A B with A 16x16 by rows, B 16x8 by columns, D in float32.
PEFTOPS_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PEFTOPS_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sixteen bytes from global to shared memory, both on 16 bytes, or zeros where they do not exist. They are there after a wait for the
// group that the next commit closes; other threads see them after a barrier behind that.
PEFTOPS_DEVICE void cp_async_16(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

PEFTOPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last kPending.
template <int kPending>
PEFTOPS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two rounded to 16 bits, `low` in the low half: numeric.h's rounding in one instruction.
PEFTOPS_DEVICE uint32_t pack(bfloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

PEFTOPS_DEVICE uint32_t pack(float16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Until the kernel before it on the stream has ended, whose results can be read from here on; of a launch that may start before that.
PEFTOPS_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

PEFTOPS_DEVICE float unpack(float16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half.bits));
  return value;
}

// The same value, made here: what is computed from it cannot move out of a loop, where it would hold registers.
PEFTOPS_DEVICE int made_here(int value) {
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
  return value;
}

#else
#define PEFTOPS_DEVICE static inline
#define PEFTOPS_MEMBER inline

void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void cp_async_16(void* to, const void* from, bool exists);
void cp_async_commit();
void cp_async_wait(int pending);

template <int kPending>
PEFTOPS_DEVICE void cp_async_wait() {
  cp_async_wait(kPending);
}

PEFTOPS_DEVICE uint32_t pack(bfloat16, float low, float high) {
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
}
PEFTOPS_DEVICE uint32_t pack(float16, float low, float high) {
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
}
PEFTOPS_DEVICE float unpack(float16 half) { return to_float(half); }
PEFTOPS_DEVICE int made_here(int value) { return value; }
#endif

PEFTOPS_DEVICE float unpack(bfloat16 value) { return to_float(value); }

}  // namespace peftops
