// Warp-wide instructions for the emulator, by the fragment layouts of the PTX ISA: "Warp-level matrix instructions" (ldmatrix, mma).
#include <cstring>

#include "../../csrc/common/numeric.h"
#include "emulator.h"

using emulator::kWarp;

namespace peftops {
namespace {

constexpr int kMatrices = 4, kMatrixRows = 8, kMatrixColumns = 8;

struct MatrixOperands {
  uint32_t* registers;
  const void* row;
};

// Lane 8 m + r names row r of matrix m. Lane l gets the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each matrix.
template <bool kTransposed>
void load_matrices(void* const (&operands)[kWarp]) {
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t matrix[kMatrixRows][kMatrixColumns];
    for (int r = 0; r < kMatrixRows; ++r) {
      const void* row = static_cast<MatrixOperands*>(operands[kMatrixRows * m + r])->row;
      const char* wrong = !emulator::in_shared_memory(row, sizeof matrix[r])         ? " is not in shared memory"
                          : reinterpret_cast<uintptr_t>(row) % sizeof matrix[r] != 0 ? " is not a multiple of 16"
                                                                                     : nullptr;
      if (wrong) emulator::fail("ldmatrix: the address of lane " + std::to_string(kMatrixRows * m + r) + wrong);
      std::memcpy(matrix[r], row, sizeof matrix[r]);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j], high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixOperands*>(operands[lane])->registers[m] = low | high << 16;
    }
  }
}

constexpr int kM = 16, kN = 8, kK = 16;

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
float element(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

// D += A B. With g = lane / 4 and t = lane % 4, a lane has of A the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), of B (a
// pair goes down a column) (2t, g), (2t + 8, g), and of D (g, 2t), (g + 8, 2t).
template <class T>
void multiply_add(void* const (&operands)[kWarp]) {
  float a[kM][kK], b[kK][kN], d[kM][kN];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + e] = element<T>(mine.a[r], e);
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + e][g] = element<T>(mine.b[r], e);
      for (int r = 0; r < 2; ++r) d[g + 8 * r][2 * t + e] = mine.d[2 * r + e];
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < kN; ++n) d[m][n] += a[m][k] * b[k][n];  // products of 16-bit floats are exact in float32
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<MmaOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e)
      for (int r = 0; r < 2; ++r) mine.d[2 * r + e] = d[g + 8 * r][2 * t + e];
  }
}

constexpr size_t kCopyBytes = 16;

struct ShuffleOperands {
  float value;
  unsigned mask;
  int lane_mask;
};

void shuffle_xor(void* const (&operands)[kWarp]) {
  float values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) values[lane] = static_cast<ShuffleOperands*>(operands[lane])->value;
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& mine = *static_cast<ShuffleOperands*>(operands[lane]);
    if (mine.mask != 0xffffffffu) emulator::fail("__shfl_xor_sync: a mask that leaves lanes out");
    if (mine.lane_mask < 0 || mine.lane_mask >= kWarp) emulator::fail("__shfl_xor_sync: lane mask " + std::to_string(mine.lane_mask));
    mine.value = values[lane ^ mine.lane_mask];
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  MatrixOperands operands{r, row};
  emulator::collective("ldmatrix_x4", load_matrices<false>, &operands);
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  MatrixOperands operands{r, row};
  emulator::collective("ldmatrix_x4_trans", load_matrices<true>, &operands);
}

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands{d, a, b};
  emulator::collective("mma_bfloat16", multiply_add<bfloat16>, &operands);
}

void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands{d, a, b};
  emulator::collective("mma_float16", multiply_add<float16>, &operands);
}

void cp_async_16(void* to, const void* from, bool exists) {
  if (!emulator::in_shared_memory(to, kCopyBytes)) emulator::stop("cp.async: the destination is not in shared memory");
  for (const void* pointer : {static_cast<const void*>(to), from})
    if (reinterpret_cast<uintptr_t>(pointer) % kCopyBytes != 0) emulator::stop("cp.async: an address is not a multiple of 16");
  emulator::copy_later(to, exists ? from : nullptr, kCopyBytes);
}

void cp_async_commit() { emulator::commit_copies(); }

void cp_async_wait(int pending) { emulator::finish_copies(static_cast<size_t>(pending)); }

}  // namespace peftops

float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  peftops::ShuffleOperands operands{value, mask, lane_mask};
  emulator::collective("__shfl_xor_sync", peftops::shuffle_xor, &operands);
  return operands.value;
}
