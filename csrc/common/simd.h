// Vectors of one instruction-set level, on the compiler's vector extension: one source serves SSE2, NEON, AVX2 and AVX-512.
//
// Only for files that CMakeLists.txt compiles once per level. Everything sits in an unnamed namespace, so that no function
// compiled for a higher level can replace one of a lower level at link time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "numeric.h"
#include "philox.h"

#if defined(__AVX512F__)
#define PEFTOPS_VECTOR_BYTES 64
#elif defined(__AVX__)
#define PEFTOPS_VECTOR_BYTES 32
#else
#define PEFTOPS_VECTOR_BYTES 16
#endif

namespace peftops {
namespace {

template <class T>
struct VectorOf;
#define PEFTOPS_VECTOR(T)                                              \
  template <>                                                          \
  struct VectorOf<T> {                                                 \
    typedef T type __attribute__((vector_size(PEFTOPS_VECTOR_BYTES))); \
  };
PEFTOPS_VECTOR(float)
PEFTOPS_VECTOR(double)
PEFTOPS_VECTOR(uint32_t)
PEFTOPS_VECTOR(int32_t)
PEFTOPS_VECTOR(int64_t)
#undef PEFTOPS_VECTOR
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanes = PEFTOPS_VECTOR_BYTES / sizeof(T);

// Sixteen-bit values, as many as a vector has floats.
typedef uint16_t HalfVector __attribute__((vector_size(PEFTOPS_VECTOR_BYTES / 2)));

template <class V, class T>
inline V load_raw(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store_raw(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Accumulator type of a storage type: float32, and float64 for float64.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// A full vector of accumulators from memory.
inline Vector<float> load(const float* from) { return load_raw<Vector<float>>(from); }
inline Vector<double> load(const double* from) { return load_raw<Vector<double>>(from); }
inline Vector<float> load(const bfloat16* from) {
  return bit_cast<Vector<float>>(__builtin_convertvector(load_raw<HalfVector>(from), Vector<uint32_t>) << 16);
}
inline Vector<float> load(const float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps((__m256i)load_raw<HalfVector>(from));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)load_raw<HalfVector>(from));
#else
  Vector<float> v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

// One rounding, to nearest even.
inline void store(float* to, Vector<float> v) { store_raw(to, v); }
inline void store(double* to, Vector<double> v) { store_raw(to, v); }
inline void store(bfloat16* to, Vector<float> v) {
#ifdef __AVX512BF16__
  // The instruction reads subnormals as zero, so they take the way of integers.
  if (_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0) return store_raw(to, _mm512_cvtneps_pbh((__m512)v));
#endif
  const auto bits = bit_cast<Vector<uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto nan = (bits >> 16) | 0x40u;
  store_raw(to, __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, HalfVector));
}
inline void store(float16* to, Vector<float> v) {
#if defined(__AVX512F__)
  store_raw(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store_raw(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) to[i] = to_float16(v[i]);
#endif
}

// The first `count` lanes; the others are zero.
template <class T>
inline Vector<Accumulator<T>> load_part(const T* from, int64_t count) {
  T lanes[kLanes<Accumulator<T>>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_part(T* to, Vector<Accumulator<T>> v, int64_t count) {
  T lanes[kLanes<Accumulator<T>>];
  store(lanes, v);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

inline float one(const float* from) { return *from; }
inline double one(const double* from) { return *from; }
inline float one(const bfloat16* from) { return to_float(*from); }
inline float one(const float16* from) { return to_float(*from); }
inline void put(float* to, float v) { *to = v; }
inline void put(double* to, double v) { *to = v; }
inline void put(bfloat16* to, float v) { *to = to_bfloat16(v); }
inline void put(float16* to, float v) { *to = to_float16(v); }

template <class V>
inline auto sum_lanes(V v) {
  auto sum = v[0];
  for (size_t i = 1; i < sizeof v / sizeof v[0]; ++i) sum += v[i];
  return sum;
}
#if defined(__AVX512F__)
inline float sum_lanes(Vector<float> v) { return _mm512_reduce_add_ps((__m512)v); }
#endif

// out[j] = sum_lanes(v[j]) for `count` vectors, at most sixteen; all sixteen may be read.
template <class A>
inline void sum_each(const Vector<A>* v, int64_t count, A* out) {
#if defined(__AVX512F__)
  // The halves that sum_lanes adds, of two vectors in one: distances of 8, 4, 2 and 1 lanes.
  if constexpr (sizeof(A) == 4) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 sum[16];
    for (int j = 0; j < 16; ++j) sum[j] = (__m512)v[j];
    for (int distance = 8; distance; distance /= 2) {
      const __m512i bit = _mm512_set1_epi32(distance), other = _mm512_xor_si512(lane, bit);
      const __mmask16 second = _mm512_test_epi32_mask(lane, bit);
      const __m512i places = _mm512_mask_add_epi32(other, second, other, _mm512_set1_epi32(16));
      for (int j = 0; j < distance; ++j)
        sum[j] = _mm512_add_ps(_mm512_mask_blend_ps(second, sum[j], sum[j + distance]),
                               _mm512_permutex2var_ps(sum[j], places, sum[j + distance]));
    }
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << count) - 1), sum[0]);
    return;
  }
#endif
  for (int64_t j = 0; j < count; ++j) out[j] = sum_lanes(v[j]);
}

// Lanes whose bit is clear become zero, NaN and infinity included. `bits` holds one bit per lane, lane 0 first.
template <class A>
inline Vector<A> keep(Vector<A> v, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vector<A>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
  else
    return (Vector<A>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v);
#else
  using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vector<I> bit;
  for (int64_t i = 0; i < kLanes<A>; ++i) bit[i] = I{1} << i;
  const Vector<I> kept = ((bit & static_cast<I>(bits)) != 0);
  return bit_cast<Vector<A>>(bit_cast<Vector<I>>(v) & kept);
#endif
}

// The keep-bits of the lanes that start at `column`, a multiple of their number, in a row of the mask.
template <class A>
inline uint32_t keep_bits(const uint8_t* row, int64_t column) {
  if constexpr (kLanes<A> == 16)
    return row[column / 8] | static_cast<uint32_t>(row[column / 8 + 1]) << 8;
  else
    return row[column / 8] >> (column % 8);
}

#if defined(__AVX512BW__) && defined(__BMI2__)
// Keep-bytes of kGroups times sixteen blocks. One group alone would wait for its own multiplications.
template <int kGroups>
inline void dropout_groups(uint64_t seed, int64_t row, int64_t begin, uint32_t threshold, uint8_t* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier0)), m1 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier1));
  const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
  const auto multiply = [](__m512i x, __m512i m, __m512i& high) {
    const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
    return _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  };
  __m512i c[kGroups][4];
  for (int g = 0; g < kGroups; ++g) {
    c[g][0] = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin + 16 * g)), lane);
    c[g][1] = _mm512_set1_epi32(static_cast<int>(row));
    c[g][2] = _mm512_set1_epi32(static_cast<int>(row >> 32));
    c[g][3] = _mm512_setzero_si512();
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1) {
    const __m512i key0 = _mm512_set1_epi32(static_cast<int>(k0)), key1 = _mm512_set1_epi32(static_cast<int>(k1));
    for (int g = 0; g < kGroups; ++g) {
      __m512i high0, high1;
      const __m512i low0 = multiply(c[g][0], m0, high0), low1 = multiply(c[g][2], m1, high1);
      c[g][0] = _mm512_ternarylogic_epi32(high1, c[g][1], key0, 0x96);  // exclusive or of the three
      c[g][1] = low1;
      c[g][2] = _mm512_ternarylogic_epi32(high0, c[g][3], key1, 0x96);
      c[g][3] = low0;
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    // Each comparison gives two bits per block; pdep spreads them over the blocks' bytes.
    uint64_t bits[4];
    for (int w = 0; w < 4; ++w) bits[w] = _mm512_cmpge_epu16_mask(c[g][w], limit);
    for (int half = 0; half < 2; ++half) {
      uint64_t bytes = 0;
      for (int w = 0; w < 4; ++w) bytes |= _pdep_u64(bits[w] >> (16 * half), 0x0303030303030303ull << (2 * w));
      std::memcpy(out + 16 * g + 8 * half, &bytes, sizeof bytes);
    }
  }
}
#endif

// Keep-bytes of one row, blocks [begin, begin + count): the vector form of dropout_byte.
inline void dropout_bytes(uint64_t seed, int64_t row, int64_t begin, int64_t count, uint32_t threshold, uint8_t* out) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__BMI2__)
  if (threshold < 0x10000u) {
    for (; i + 32 <= count; i += 32) dropout_groups<2>(seed, row, begin + i, threshold, out + i);
    for (; i + 16 <= count; i += 16) dropout_groups<1>(seed, row, begin + i, threshold, out + i);
  }
#endif
  for (; i < count; ++i) out[i] = dropout_byte(seed, row, begin + i, threshold);
}

}  // namespace
}  // namespace peftops
