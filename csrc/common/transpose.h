// Transposing within AVX-512 registers. For files that are compiled per instruction-set level.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

#include <cstdint>

namespace peftops {
namespace {

// Where the numbers of two registers, one after the other, come from when a bit of the register's place changes places with a bit of the
// lane: `low` for the register whose bit is clear.
template <class Number>
struct Swap {
  alignas(64) Number low[64 / sizeof(Number)], high[64 / sizeof(Number)];

  constexpr explicit Swap(Number bit) : low(), high() {
    constexpr Number lanes = 64 / sizeof(Number);
    for (Number lane = 0; lane < lanes; ++lane) {
      low[lane] = lane & bit ? lanes + (lane ^ bit) : lane;
      high[lane] = lane & bit ? lanes + lane : lane ^ bit;
    }
  }
};

// Eight registers and the last three bits of the lane change places.
template <class Number>
inline void transpose(__m512i (&v)[8]) {
  static constexpr Swap<Number> swaps[3] = {Swap<Number>(1), Swap<Number>(2), Swap<Number>(4)};
  for (int b = 0; b < 3; ++b) {
    const __m512i low = _mm512_load_si512(swaps[b].low), high = _mm512_load_si512(swaps[b].high);
    for (int i = 0; i < 8; ++i) {
      if (i >> b & 1) continue;
      const __m512i first = v[i], second = v[i | 1 << b];
      v[i] = sizeof(Number) == 4 ? _mm512_permutex2var_epi32(first, low, second) : _mm512_permutex2var_epi64(first, low, second);
      v[i | 1 << b] = sizeof(Number) == 4 ? _mm512_permutex2var_epi32(first, high, second) : _mm512_permutex2var_epi64(first, high, second);
    }
  }
}

}  // namespace
}  // namespace peftops
#endif
