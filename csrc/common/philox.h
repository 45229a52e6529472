// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the dropout mask made from it.
#pragma once

#include <cstdint>

#include "index.h"

namespace peftops {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Philox4 {
  uint32_t word[4];
};

PEFTOPS_HOST_DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// An element is kept iff its 16 random bits are at least this; 65536 keeps none.
PEFTOPS_HOST_DEVICE uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(65536.0 * p + 0.5); }

// Eight keep-bits of one row: bit j belongs to column 8 * block + j.
PEFTOPS_HOST_DEVICE uint8_t dropout_byte(uint64_t seed, int64_t row, int64_t block, uint32_t threshold) {
  const Philox4 random = philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}},
                                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  uint8_t bits = 0;
  for (int j = 0; j < 8; ++j) {
    const uint32_t half = (random.word[j / 2] >> (16 * (j % 2))) & 0xffffu;
    bits = static_cast<uint8_t>(bits | (half >= threshold) << j);
  }
  return bits;
}

}  // namespace peftops
