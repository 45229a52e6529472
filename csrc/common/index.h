// Index arithmetic: 64-bit, and every narrowing is a function that can refuse. Host and device.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

// `static`: files are compiled for several instruction-set levels, and the linker must not merge their copies.
#ifdef __CUDACC__
#define PEFTOPS_HOST_DEVICE static inline __host__ __device__
#else
#define PEFTOPS_HOST_DEVICE static inline
#endif

namespace peftops {

PEFTOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
PEFTOPS_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PEFTOPS_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Offset in elements of (row, column) where rows are `stride` apart.
PEFTOPS_HOST_DEVICE constexpr int64_t offset_of(int64_t row, int64_t stride, int64_t column) { return row * stride + column; }

// a * b, or an error where that does not fit 64 bits.
inline int64_t checked_product(int64_t a, int64_t b, const char* what) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product))
    throw std::overflow_error(std::string(what) + ": " + std::to_string(a) + " * " + std::to_string(b) + " does not fit 64 bits");
  return product;
}

// The value as int32, or an error.
inline int32_t checked_int32(int64_t value, const char* what) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    throw std::overflow_error(std::string(what) + ": " + std::to_string(value) + " does not fit 32 bits");
  return static_cast<int32_t>(value);
}

}  // namespace peftops
