// How tiles lie in shared memory: 64 elements a row, its 16-byte units exchanged so that neither the eight rows of an ldmatrix phase nor
// eight lanes that read float32 down a column meet in one bank. Host and device.
#pragma once

#include <cute/layout.hpp>
#include <cute/swizzle_layout.hpp>

namespace peftops {

constexpr int kTileColumns = 64;

namespace detail {
template <int kElementBytes>
struct TileSwizzle;
template <>
struct TileSwizzle<2> {
  using type = cute::Swizzle<3, 3, 3>;  // 8 elements a unit; a row is 8 units
};
template <>
struct TileSwizzle<4> {
  using type = cute::Swizzle<3, 2, 4>;  // 4 elements a unit; a row is 16 units
};
}  // namespace detail

// (row, column) -> offset in elements, in eight rows; further rows follow in blocks of eight.
template <int kElementBytes>
using TileLayout = decltype(cute::composition(
    typename detail::TileSwizzle<kElementBytes>::type{},
    cute::Layout<cute::Shape<cute::_8, cute::Int<kTileColumns>>, cute::Stride<cute::Int<kTileColumns>, cute::_1>>{}));

// The same for tiles of 16-bit elements with 32 a row: two rows share the 32 banks.
constexpr int kNarrowTileColumns = 32;
using NarrowTileLayout = decltype(cute::composition(
    cute::Swizzle<2, 3, 3>{},
    cute::Layout<cute::Shape<cute::_8, cute::Int<kNarrowTileColumns>>, cute::Stride<cute::Int<kNarrowTileColumns>, cute::_1>>{}));

}  // namespace peftops
