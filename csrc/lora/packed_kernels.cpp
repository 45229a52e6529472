// Products with a packed weight, compiled once per instruction-set level: PEFTOPS_LEVEL_KERNELS is the name of the level's entry.
//
// A task keeps the sums of some rows by a few blocks of 16 columns in registers while it goes through the contraction. Every sum is made
// in the same order whatever the rows beside it: piece by piece, each summed in registers, then added to the pieces before.
#include "packed_kernels.h"

#include "../common/simd.h"
#include "../common/transpose.h"
#include "plan.h"

namespace peftops::lora::packed {
namespace {

// Accumulators in registers.
constexpr int kSums = PEFTOPS_VECTOR_BYTES == 64 ? 24 : 8;

// Products of accumulators: T is the storage of the weight. A vector has two lanes for each column, one for each number of a pair, which
// are added at the end of a piece.
template <class T>
struct Wide {
  using Acc = Accumulator<T>;
  using Stored = T;
  using Operand = Vector<Acc>;
  struct Element {
    Acc even, odd;
  };
  static constexpr int64_t lanes = kLanes<Acc> / 2;  // columns of a vector

  static Operand operand(const T* from) { return load(from); }
  static Operand broadcast(const Element& x) {
    if constexpr (sizeof(Acc) == 4) return bit_cast<Operand>(Vector<int64_t>{} + bit_cast<int64_t>(x));
    Operand v;
    for (int64_t i = 0; i < kLanes<Acc>; ++i) v[i] = i % 2 ? x.odd : x.even;
    return v;
  }
  static Vector<Acc> add_product(Vector<Acc> sum, Operand w, Operand x) { return sum + w * x; }
  // The elements of two vectors of columns.
  static Vector<Acc> join(Vector<Acc> a, Vector<Acc> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Acc) == 4) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return (Vector<Acc>)_mm512_add_ps(_mm512_permutex2var_ps((__m512)a, even, (__m512)b),
                                        _mm512_permutex2var_ps((__m512)a, _mm512_or_si512(even, _mm512_set1_epi32(1)), (__m512)b));
    }
#endif
    Vector<Acc> v;
    for (int64_t i = 0; i < kLanes<Acc>; ++i) v[i] = i < lanes ? a[2 * i] + a[2 * i + 1] : b[2 * (i - lanes)] + b[2 * (i - lanes) + 1];
    return v;
  }
  template <class F>
  static Element element(const F* even, const F* odd) {
    return {one(even), odd ? one(odd) : 0};
  }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16, the first in the low half.
struct Dot {
  using Acc = float;
  using Stored = bfloat16;
  using Operand = __m512i;
  using Element = uint32_t;
  static constexpr int64_t lanes = 16;

  static Operand operand(const bfloat16* from) { return _mm512_loadu_si512(from); }
  static Operand broadcast(Element x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Vector<float> add_product(Vector<float> sum, Operand w, Operand x) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  template <class F>
  static Element element(const F* low, const F* high) {
    return half(*low) | (high ? half(*high) << 16 : 0);
  }
  static uint32_t half(float value) { return to_bfloat16(value).bits; }
  static uint32_t half(bfloat16 value) { return value.bits; }
};
template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, bfloat16>, Dot, Wide<T>>;
#else
template <class T>
using ArithmeticOf = Wide<T>;
#endif

// Vectors of a block; blocks and rows of a tile.
template <class M>
constexpr int kVectors = static_cast<int>(kPackedLanes / M::lanes);
template <class M>
constexpr int kGroup = kVectors<M> <= 2 ? 3 : 1;

constexpr int power_of_two_below(int n) { return n < 2 ? 1 : 2 * power_of_two_below(n / 2); }
template <class M>
constexpr int kRows = power_of_two_below(kSums / (kGroup<M> * kVectors<M>));

// Steps of a piece. Without fused multiply-add each product is rounded as well, so the sums in registers are shorter.
template <class M>
constexpr int64_t kPiece = kPackedPiece / static_cast<int64_t>(kPackedStep * sizeof(typename M::Stored));

// sums[i][g] += products of `steps` steps: I rows, G blocks. The weight further on is asked for where `ask` says so.
template <class M, int I, int G>
inline void micro(const typename M::Element* x, const typename M::Stored* weight, int64_t block_stride, int64_t steps, bool ask,
                  typename M::Acc* sums) {
  using A = typename M::Acc;
  constexpr int P = kVectors<M>, V = G * P;
  Vector<A> sum[I][V] = {};
  for (int64_t k = 0; k < steps; ++k, weight += kPackedStep) {
    typename M::Operand w[V];
    for (int v = 0; v < V; ++v) w[v] = M::operand(weight + (v / P) * block_stride + (v % P) * M::lanes * 2);
    if (ask)
      for (int g = 0; g < G; ++g)
        for (size_t byte = 0; byte < kPackedStep * sizeof *weight; byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(weight + g * block_stride) + byte + kPackedAhead);
    for (int i = 0; i < I; ++i) {
      const typename M::Operand row = M::broadcast(x[k * I + i]);
      for (int v = 0; v < V; ++v) sum[i][v] = M::add_product(sum[i][v], w[v], row);
    }
  }
  for (int i = 0; i < I; ++i)
    for (int64_t c = 0; c < G * kPackedLanes; c += kLanes<A>) {
      A* to = sums + i * G * kPackedLanes + c;
      if constexpr (M::lanes == kLanes<A>)
        store(to, load(to) + sum[i][c / M::lanes]);
      else
        store(to, load(to) + M::join(sum[i][c / M::lanes], sum[i][c / M::lanes + 1]));
    }
}

// body(number of rows, first row) for strips of I rows, then of half as many, and so on.
template <int I, class Body>
inline void for_strips(int64_t row, int64_t end, const Body& body) {
  for (; row + I <= end; row += I) body(std::integral_constant<int, I>{}, row);
  if constexpr (I > 1) for_strips<I / 2>(row, end, body);
}

// sums [rows][G * 16] += x W^T over a segment: rows [row, end), G blocks from `weight` on. Piece by piece, so that a piece of the weight
// is read from memory once.
template <class M, int R, int G>
void add_segment(const Segment& segment, const void* weight, int64_t row, int64_t end, typename M::Acc* sums) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  constexpr int64_t piece = kPiece<M>;
#else
  constexpr int64_t piece = kPiece<M> / 4;
#endif
  const auto* x = static_cast<const typename M::Element*>(segment.x);
  const auto* w = static_cast<const typename M::Stored*>(weight);
  for (int64_t k = 0; k < segment.steps; k += piece) {
    const int64_t steps = min_of(piece, segment.steps - k);
    for_strips<R>(row, end, [&](auto count, int64_t i) {
      constexpr int I = decltype(count)::value;
      micro<M, I, G>(x + i * segment.steps + k * I, w + k * kPackedStep, segment.steps * kPackedStep, steps, i == 0,
                     sums + (i - row) * G * kPackedLanes);
    });
  }
}

#ifdef __AVX512F__
// Eight pairs of sixteen rows.
template <class T>
inline void pack_eight_pairs(const T* from, int64_t row_stride, T* to) {
  __m512i v[8];
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 8; ++i)
      v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_raw<__m256i>(from + i * row_stride)),
                                load_raw<__m256i>(from + (i + 8) * row_stride), 1);
    transpose<uint32_t>(v);
    for (int k = 0; k < 8; ++k) _mm512_storeu_si512(to + k * kPackedStep, v[k]);
  } else {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) v[i] = _mm512_loadu_si512(from + (i + 8 * half) * row_stride);
      transpose<uint64_t>(v);
      for (int k = 0; k < 8; ++k) _mm512_storeu_si512(to + k * kPackedStep + 16 * half, v[k]);
    }
  }
}
#endif

// Sixteen rows of pairs that lie together: a pair moves as one number.
template <class T>
void pack_pairs(const T* from, int64_t row_stride, int64_t pairs, T* to) {
  using Two = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  int64_t begin = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(T) <= 4)
    for (; begin + 8 <= pairs; begin += 8) pack_eight_pairs(from + 2 * begin, row_stride, to + begin * kPackedStep);
#endif
  for (int64_t j = 0; j < kPackedLanes; ++j)
    for (int64_t k = begin; k < pairs; ++k)
      for (size_t part = 0; part < 2 * sizeof(T); part += sizeof(Two))
        store_raw(reinterpret_cast<char*>(to + k * kPackedStep + 2 * j) + part,
                  load_raw<Two>(reinterpret_cast<const char*>(from + j * row_stride + 2 * k) + part));
}

// A block of the packed form: numbers are moved and not looked at.
template <class T>
void pack_block(const Strided& m, int64_t block, T* to) {
  const int64_t lanes = min_of(kPackedLanes, m.rows - block * kPackedLanes);
  const T* from = static_cast<const T*>(m.data) + block * kPackedLanes * m.row_stride;
  constexpr int64_t kTile = 32;  // columns: about a cache line of a row
  for (int64_t k = 0; k < m.columns; k += kTile, to += kTile * kPackedLanes) {
    const int64_t columns = min_of(kTile, m.columns - k);
    const T* tile = from + k * m.column_stride;
    if (lanes == kPackedLanes && columns % 2 == 0 && m.column_stride == 1) {
      pack_pairs(tile, m.row_stride, columns / 2, to);
      continue;
    }
    std::memset(to, 0, static_cast<size_t>(round_up(columns, 2) * kPackedLanes) * sizeof(T));
    for (int64_t j = 0; j < lanes; ++j)
      for (int64_t c = 0; c < columns; ++c) to[c / 2 * kPackedStep + j * 2 + c % 2] = tile[j * m.row_stride + c * m.column_stride];
  }
}

template <class T>
void pack(const Strided& weight, void* packed, int64_t begin, int64_t end) {
  const int64_t size = ceil_div(weight.columns, 2) * kPackedStep;
  for (int64_t block = begin; block < end; ++block) pack_block(weight, block, static_cast<T*>(packed) + block * size);
}

// T: storage of x, weight, bias and y. F: of the factors.
template <class T, class F, int G>
void columns(const LinearTask& t, int64_t block) {
  using Base = ArithmeticOf<T>;
  using Lora = ArithmeticOf<F>;
  using A = typename Base::Acc;
  constexpr int R = kRows<Base>;
  alignas(64) A sums[kPackedRows * G * kPackedLanes];
  const T* weight = static_cast<const T*>(t.base.weight) + block * t.base.steps * kPackedStep;
  const F* b = static_cast<const F*>(t.lora.weight) + block * t.lora.steps * kPackedStep;
  const int64_t first = block * kPackedLanes, width = min_of(G * kPackedLanes, t.out_features - first);
  for (int64_t row = 0; row < t.rows; row += kPackedRows) {
    const int64_t end = min_of(row + kPackedRows, t.rows);
    std::memset(sums, 0, static_cast<size_t>((end - row) * G * kPackedLanes) * sizeof(A));
    add_segment<Base, R, G>(t.base, weight, row, end, sums);
    if (t.lora.x) add_segment<Lora, R, G>(t.lora, b, row, end, sums);
    for (int64_t i = row; i < end; ++i) {
      const A* from = sums + (i - row) * G * kPackedLanes;
      T* y = static_cast<T*>(t.y) + i * t.out_features + first;
      const T* bias = t.bias ? static_cast<const T*>(t.bias) + first : nullptr;
      for (int64_t c = 0; c < width; c += kLanes<A>) {
        Vector<A> v = load(from + c);
        const int64_t count = min_of(kLanes<A>, width - c);
        if (bias) v += count == kLanes<A> ? load(bias + c) : load_part(bias + c, count);
        if (count == kLanes<A>)
          store(y + c, v);
        else
          store_part(y + c, v, count);
      }
    }
  }
}

template <class T, class F>
void linear(const LinearTask& t, int64_t begin, int64_t end) {
  constexpr int G = kGroup<ArithmeticOf<T>>;
  const int64_t blocks = ceil_div(t.out_features, kPackedLanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * G, last = min_of(first + G, blocks);
    if (t.lora.x) pack<F>(t.b, t.packed_b, first, last);
    if (last - first == G)
      columns<T, F, G>(t, first);
    else
      for (int64_t block = first; block < last; ++block) columns<T, F, 1>(t, block);
  }
}

// Rows of storage T for products of M, in strips of at most R rows.
template <class M, int R, class T>
void strip(const StripTask& t, int64_t begin, int64_t end) {
  const int64_t steps = ceil_div(t.columns, 2), whole = min_of(end * kPackedChunk, t.columns / 2);
  for_strips<R>(0, t.rows, [&](auto count, int64_t row) {
    constexpr int I = decltype(count)::value;
    const T* from = static_cast<const T*>(t.from) + row * t.columns;
    auto* to = static_cast<typename M::Element*>(t.to) + row * steps;
    for (int64_t k = begin * kPackedChunk; k < whole; ++k)
      for (int i = 0; i < I; ++i) to[k * I + i] = M::element(from + i * t.columns + 2 * k, from + i * t.columns + 2 * k + 1);
    if (whole < steps && steps <= end * kPackedChunk)
      for (int i = 0; i < I; ++i) to[whole * I + i] = M::template element<T>(from + i * t.columns + 2 * whole, nullptr);
  });
}

template <class T, class F>
constexpr Kernels make() {
  using Base = ArithmeticOf<T>;
  using Lora = ArithmeticOf<F>;
  constexpr int R = kRows<Base>;
  return {kGroup<Base>,
          sizeof(typename Base::Element),
          sizeof(typename Lora::Element),
          pack<T>,
          strip<Base, R, T>,
          strip<Lora, R, typename Base::Acc>,
          linear<T, F>};
}

const Kernels& find(Storage x, Storage factors) {
  static constexpr Kernels single = make<float, float>(), twice = make<double, double>(), bf16 = make<bfloat16, bfloat16>(),
                           bf16_mixed = make<bfloat16, float>(), half = make<float16, float16>(), half_mixed = make<float16, float>();
  switch (x) {
    case Storage::float64: return twice;
    case Storage::bfloat16: return factors == Storage::bfloat16 ? bf16 : bf16_mixed;
    case Storage::float16: return factors == Storage::float16 ? half : half_mixed;
    default: return single;
  }
}

}  // namespace

const LevelKernels& PEFTOPS_LEVEL_KERNELS() {
  static constexpr LevelKernels kernels{find};
  return kernels;
}

}  // namespace peftops::lora::packed
