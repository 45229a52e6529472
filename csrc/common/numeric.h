// Number formats and their rounding, host and device: the one definition that CPU and CUDA kernels share.
#pragma once

#include <cstdint>
#include <cstring>

#include "index.h"

namespace peftops {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

PEFTOPS_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

PEFTOPS_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PEFTOPS_HOST_DEVICE float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
PEFTOPS_HOST_DEVICE bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

PEFTOPS_HOST_DEVICE float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // Exponent and mantissa moved to float32's place are off by a factor of 2^112, subnormals included.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

// Round to nearest, ties to even; beyond 65504 + half an ulp to infinity; a NaN stays a NaN.
PEFTOPS_HOST_DEVICE float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the last kept bit at the end of float32's mantissa, so the adder does the rounding.
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

}  // namespace peftops
