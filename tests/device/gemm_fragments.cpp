// The keep-bits of wgmma's accumulators (csrc/lora/gemm_sm90_keep.cuh), put to use where CUTLASS says that the accumulators lie: for every
// tile of a matrix, kept elements are counted. Prints one line "tile row column count" for each element that was not kept or dropped once.
// Arguments: rows, columns, bytes between rows, bytes behind the last one, after which memory ends. The bit of (row, column) is that of a
// hash.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <vector>

#include "lora/gemm_sm90_keep.cuh"

using namespace peftops::lora;
using cute::GMMA::Major;

int64_t rows, columns, stride, behind;

bool kept(int64_t row, int64_t column) { return (row * 2654435761u ^ column * 2246822519u) >> 13 & 1; }

template <int kRows, int kColumns, class Tiled>
void check(const char* name, Tiled tiled) {
  constexpr int kThreads = cute::size(Tiled{});
  using Bits = sm90::KeepBits<kRows, kColumns, kThreads>;
  constexpr int64_t kPage = 4096;
  const int64_t held = rows * stride + behind, pages = (held + kPage - 1) / kPage;
  auto* memory = static_cast<uint8_t*>(mmap(nullptr, (pages + 1) * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + pages * kPage, kPage, PROT_NONE);
  uint8_t* bytes = memory + pages * kPage - held;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t byte = 0; byte < stride; ++byte) {
      uint8_t& value = bytes[row * stride + byte] = 0;
      for (int64_t bit = 0; bit < 8; ++bit)
        if (8 * byte + bit < columns && kept(row, 8 * byte + bit)) value |= 1 << bit;
    }
  auto places = cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{});
  for (int64_t m = 0; m < rows; m += kRows)
    for (int64_t n = 0; n < columns; n += kColumns) {
      std::vector<Bits> all(kThreads);
      for (int thread = 0; thread < kThreads; ++thread) all[thread].load({bytes, stride}, rows, int2{int(m), int(n)}, thread);
      std::vector<int> seen(kRows * kColumns);
      for (int thread = 0; thread < kThreads; ++thread) {
        auto own = tiled.get_slice(thread).partition_C(places);  // ((2, 2, columns / 8), rows / 64, 1)
        std::vector<float> sums(cute::size(own), 1.0f);
        auto sum = cute::make_tensor(sums.data(), cute::make_layout(shape(own)));
        Bits::apply(
            thread, [&](int j, int i, int g, int row) -> float& { return sum(cute::make_coord(j, i, g), row, 0); },
            [&](int row, int word, int lane) { return all[thread / 4 * 4 + lane].words[row][word]; });
        for (int i = 0; i < cute::size(own); ++i) {
          const int row = cute::get<0>(own(i)), column = cute::get<1>(own(i));
          const bool inside = m + row < rows && n + column < columns;
          seen[row * kColumns + column] += 1 + (sum(i) != float(inside && kept(m + row, n + column))) * 100;
        }
      }
      for (int i = 0; i < kRows * kColumns; ++i)
        if (seen[i] != 1) std::printf("%s %d %d %d\n", name, int(m) + i / kColumns, int(n) + i % kColumns, seen[i]);
    }
}

int main(int, char** arguments) {
  rows = std::atoll(arguments[1]), columns = std::atoll(arguments[2]), stride = std::atoll(arguments[3]), behind = std::atoll(arguments[4]);
  check<128, 256>("large", cute::make_tiled_mma(cute::SM90_64x256x16_F32BF16BF16_SS<Major::K, Major::MN>{},
                                                cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  check<128, 128>("small", cute::make_tiled_mma(cute::SM90_64x128x16_F32F16F16_SS<Major::K, Major::MN>{},
                                                cute::Layout<cute::Shape<cute::_1, cute::_1, cute::_1>>{}));
}
