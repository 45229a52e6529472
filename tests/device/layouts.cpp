// The shared-memory tiles of the LoRA kernels as their own code fills and reads them, for test_layouts.py: a line of JSON each.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>
#include <vector>

// What nvcc knows by itself; here every thread has its turn.
#define __launch_bounds__(...)
static struct {
  unsigned x, y, z;
} threadIdx, blockIdx, gridDim;
static void __syncthreads() {}

#include "lora/gemm_sm80.cuh"
#include "lora/sm80.cuh"

unsigned char* shared_memory;

namespace peftops {

alignas(128) static unsigned char memory[128 * 1024];
static std::vector<long> read;  // offsets of ldmatrix in bytes, in the order of one lane

static void record(const void* row) { read.push_back(static_cast<const unsigned char*>(row) - memory); }
void ldmatrix_x4(uint32_t (&)[4], const void* row) { record(row); }
void ldmatrix_x4_trans(uint32_t (&)[4], const void* row) { record(row); }
void mma_bfloat16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
void mma_float16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
void cp_async_16(void* to, const void*, bool) { record(to); }
void cp_async_commit() {}
void cp_async_wait(int) {}

namespace lora::sm80 {

static void print(const char* name, const std::vector<long>& values) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf(i ? ", %ld" : "%ld", values[i]);
  std::printf("]");
}

// A tile [rows, columns] of elements E. at: the offset of each element in bytes, row by row. held: which element (row * columns + column)
// each place holds after all threads have put their chunks, -1 where none does.
template <class E, int kRows, int kColumns>
void tile() {
  constexpr int kRowChunks = kColumns / 8, kChunks = kRows * kRowChunks / kThreads;
  using Mine = Share<kRowChunks>;
  E* const elements = reinterpret_cast<E*>(memory);
  const auto named = [](int id) {
    if constexpr (sizeof(E) == 2)
      return E{static_cast<uint16_t>(id + 1)};
    else
      return static_cast<float>(id + 1);
  };
  for (unsigned char& byte : memory) byte = 0;
  for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
    for (int i = 0; i < kChunks; ++i) {
      E line[8];
      for (int j = 0; j < 8; ++j) line[j] = named((i * Mine::kStep + Mine::line()) * kColumns + Mine::column() + j);
      put<kRowChunks>(elements, i, load_chunk(line, 8));
    }
  std::vector<long> offsets, held;
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column)
      offsets.push_back(reinterpret_cast<unsigned char*>(at(elements, row / 8, row % 8, column)) - memory);
  for (int i = 0; i < static_cast<int>(sizeof memory / sizeof(E)) && i < 4 * kRows * kColumns; ++i) {
    if constexpr (sizeof(E) == 2)
      held.push_back(long{elements[i].bits} - 1);
    else
      held.push_back(static_cast<long>(elements[i]) - 1);
  }
  std::printf("{\"kind\": \"tile\", \"bytes\": %zu, \"rows\": %d, \"columns\": %d, ", sizeof(E), kRows, kColumns);
  print("at", offsets);
  std::printf(", ");
  print("held", held);
  std::printf("}\n");
}

// Where the 32 lanes of each warp read by ldmatrix while they multiply a tile at 0 by one behind it: 32 offsets per call.
template <bool kADown, bool kBDown, int kTiles, int kHalves>
void product(const char* name) {
  const bfloat16* const a = reinterpret_cast<const bfloat16*>(memory);
  const bfloat16* const b = a + kHalves * kPanel;
  std::vector<long> calls;
  for (int warp_index = 0; warp_index < kThreads / 32; ++warp_index)
    for (int half = 0; half < kHalves; ++half) {
      std::vector<std::vector<long>> lanes;
      for (int i = 0; i < 32; ++i) {
        threadIdx.x = 32 * warp_index + i;
        read.clear();
        Sums<kTiles> sums{};
        multiply<kADown, kBDown>(sums, a, 16 * (kHalves * warp() + half), b, kTile / 16);
        lanes.push_back(read);
      }
      for (size_t call = 0; call < lanes[0].size(); ++call)
        for (const std::vector<long>& lane_offsets : lanes) calls.push_back(lane_offsets[call]);
    }
  std::printf("{\"kind\": \"product\", \"name\": \"%s\", ", name);
  print("calls", calls);
  std::printf("}\n");
}

// What all lanes of all warps touch while `run` has its turn for each: 32 offsets per call.
template <class Run>
void print_calls(const char* kind, const char* name, const Run& run) {
  std::vector<long> calls;
  for (int warp_index = 0; warp_index < kThreads / 32; ++warp_index) {
    std::vector<std::vector<long>> lanes;
    for (int i = 0; i < 32; ++i) {
      threadIdx.x = 32 * warp_index + i;
      read.clear();
      run();
      lanes.push_back(read);
    }
    for (size_t call = 0; call < lanes[0].size(); ++call)
      for (const std::vector<long>& lane_offsets : lanes) calls.push_back(lane_offsets[call]);
  }
  std::printf("{\"kind\": \"%s\", \"name\": \"%s\", ", kind, name);
  print("calls", calls);
  std::printf("}\n");
}

template <bool kDown>
void gemm_calls(const char* product, const char* operand) {
  bfloat16* const x = reinterpret_cast<bfloat16*>(memory);
  print_calls("product", product, [&] {
    GemmSums sums{};
    multiply_tile<kDown>(sums, x, warp() % 2 * kGemmWarpTile, x + kOperandElements, warp() / 2 * kGemmWarpTile);
  });
  print_calls("sent", operand, [&] { send<kDown>(x, memory, 128, 0, 128, 0, 128); });
}

void gemm_result() {
  bfloat16* const d = reinterpret_cast<bfloat16*>(memory);
  print_calls("stored", "gemm", [&] {
    for (int j = 0; j < kGemmWarpTile; j += 8)
      for (int i = 0; i < kGemmWarpTile; i += 8)
        record(result_at(d, warp() % 2 * kGemmWarpTile + i + lane() / 4, warp() / 2 * kGemmWarpTile + j + 2 * (lane() % 4)));
  });
  using Mine = Share<kGemmTile / 8>;
  print_calls("loaded", "gemm", [&] {
    for (int line = Mine::line(); line < kGemmTile; line += Mine::kStep) record(result_at(d, line, Mine::column()));
  });
}

template <class E>
void tiles() {
  tile<E, 16, 64>();  // a factor by ranks
  tile<E, 64, 64>();
  tile<E, 64, 16>();  // a factor by features
  if constexpr (sizeof(E) == 2) {
    tile<E, 128, 64>();
    tile<E, 64, 128>();
  }
}

void print_all() {
  tiles<bfloat16>();
  tiles<float>();
  product<false, false, 2, 1>("shrink to 16 ranks");
  product<false, false, 8, 1>("shrink to 64 ranks, expand");
  product<false, false, 16, 1>("shrink to 128 ranks");
  product<false, true, 2, 1>("shrink down to 16 ranks");
  product<false, true, 8, 1>("shrink down to 64 ranks, expand down");
  product<false, true, 16, 1>("shrink down to 128 ranks");
  product<true, true, 2, 2>("gradient of 16 ranks");
  product<true, true, 8, 2>("gradient of 64 ranks");
  gemm_calls<false>("gemm", "rows");
  gemm_calls<true>("gemm down", "down");
  gemm_result();
  std::printf("{\"kind\": \"delta\", \"stride\": %d}\n", kDeltaStride);
}

}  // namespace lora::sm80
}  // namespace peftops

int main() { peftops::lora::sm80::print_all(); }
