// What TMA writes for the GEMM for sm_90a, and where: the boxes that CUTLASS cuts a tile of W into for the two blocks of a cluster are laid
// into shared memory as the hardware swizzles them, and read back as CUTLASS's layout says. Prints one line for each element that differs.
#include <cuda_runtime.h>

#include <cstdio>
#include <cute/tensor.hpp>
#include <vector>

// After the tensors that they use without including them.
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

using namespace cute;

constexpr int kDepth = 64, kStages = 2, kLine = 64;

// Bytes 128 lines apart exchange their units of 16 bytes by the line's number in eight.
uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

uint16_t value_of(int column, int depth) { return uint16_t(column * 251 + depth * 3 + 1); }

template <int kColumns, bool kDown>
void check() {
  using Tile = Shape<_128, Int<kColumns>, Int<kDepth>>;
  using Cluster = Shape<_2, _1, _1>;
  using Atom = std::conditional_t<kDown, GMMA::Layout_MN_SW128_Atom<uint16_t>, GMMA::Layout_K_SW128_Atom<uint16_t>>;
  using Order = std::conditional_t<kDown, Step<_2, _1, _3>, Step<_1, _2, _3>>;
  auto layout = tile_to_shape(Atom{}, Shape<Int<kColumns>, Int<kDepth>, Int<kStages>>{}, Order{});
  using Strides = std::conditional_t<kDown, Stride<_1, int64_t, int64_t>, Stride<int64_t, _1, int64_t>>;
  auto source = make_tensor(static_cast<const uint16_t*>(nullptr), make_layout(make_shape(1000, 1000, 1), Strides{}));
  using Tma = decltype(make_tma_copy_B_sm90(SM90_TMA_LOAD_MULTICAST{}, source, layout(_, _, Int<0>{}), Tile{}, Cluster{}));
  constexpr int kBox = kDown ? kDepth / 2 : kColumns / 2;  // lines of a box; each has 64 elements

  std::vector<uint16_t> memory(cosize(layout) + 1024);
  auto* shared = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  auto tile = make_tensor(make_smem_ptr(shared), layout);
  const int n = 2, k = 3, stage = 1;
  for (int rank = 0; rank < 2; ++rank) {
    const Tma tma{};
    auto part = tma.get_slice(rank);
    auto all = local_tile(tma.get_tma_tensor(make_shape(1000, 1000, 1)), Tile{}, make_coord(_, _, _), Step<Underscore, _1, _1>{});
    auto from = part.partition_S(all(_, _, n, _, 0));
    auto to = part.partition_D(tile);
    // ((a box's elements, boxes), 1, 1, tiles of the depth or stages)
    for (int box = 0; box < size<0, 1>(to); ++box) {
      const auto at = from(make_coord(0, box), 0, 0, k);
      auto* target = reinterpret_cast<char*>(raw_pointer_cast(&to(make_coord(0, box), 0, 0, stage)));
      for (int line = 0; line < kBox; ++line)
        for (int element = 0; element < kLine; ++element) {
          const int inner = int(get<0>(at)) + element, outer = int(get<1>(at)) + line;
          const auto address = reinterpret_cast<uintptr_t>(target) + 2 * (line * kLine + element);
          *reinterpret_cast<uint16_t*>(swizzled(address)) = kDown ? value_of(inner, outer) : value_of(outer, inner);
        }
    }
  }
  for (int column = 0; column < kColumns; ++column)
    for (int depth = 0; depth < kDepth; ++depth)
      if (tile(column, depth, stage) != value_of(n * kColumns + column, k * kDepth + depth))
        std::printf("%d %d: column %d, depth %d\n", kColumns, kDown, column, depth);
}

int main() {
  check<256, false>();
  check<256, true>();
  check<128, false>();
  check<128, true>();
}
