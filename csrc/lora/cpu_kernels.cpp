// LoRA on the CPU, compiled once per instruction-set level: PEFTOPS_LEVEL_KERNELS is the name of the level's entry.
//
// Tokens go through in blocks: a block of x (or dY) is converted to accumulators (or kept as pairs of bfloat16) in cache, dropout
// applied on the way, and meets a packed factor in one register-tiled loop, `tile`. All sums run in an order that depends on the
// shapes alone.
#include "cpu_kernels.h"

#include <algorithm>
#include <cstddef>

#include "../common/simd.h"
#include "../common/transpose.h"
#include "plan.h"

namespace peftops::lora {
namespace {

// Sixteen vector registers hold half the accumulators that thirty-two do.
constexpr int kTile = PEFTOPS_VECTOR_BYTES == 64 ? 16 : 8;

// Products summed in a register before they are added to the others. Without fused multiply-add each product is rounded as well, so
// the short sums are shorter.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t kShortSum = 64;
#else
constexpr int64_t kShortSum = 16;
#endif

// Products of accumulators.
template <class A>
struct Wide {
  using Acc = A;
  using Element = A;
  using Operand = Vector<A>;
  static constexpr int64_t step = 1;
  static constexpr Arithmetic arithmetic = Arithmetic::wide;
  static Vector<A> add_product(Vector<A> sum, A x, Operand b) { return sum + x * b; }
  // The element that starts at *value; `next` lies one step further along the contraction, null beyond its end.
  template <class T>
  static A element(const T* value, const T*) {
    return one(value);
  }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16, the first in the low half.
struct Dot {
  using Acc = float;
  using Element = uint32_t;
  using Operand = Vector<uint32_t>;
  static constexpr int64_t step = 2;
  static constexpr Arithmetic arithmetic = Arithmetic::dot;
  static Vector<float> add_product(Vector<float> sum, uint32_t x, Operand b) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)b);
  }
  template <class T>
  static uint32_t element(const T* low, const T* high) {
    return half(*low) | (high ? half(*high) << 16 : 0);
  }
  static uint32_t half(float value) { return to_bfloat16(value).bits; }
  static uint32_t half(bfloat16 value) { return value.bits; }
};
#endif

// out[i][v] (+)= sum_k x[i * kXRow + k * kXStep] * packed[k][v]: I rows, V vectors.
template <class M, int I, int V, int64_t kXRow, int64_t kXStep>
inline void micro(const typename M::Element* x, const typename M::Element* packed, int64_t packed_stride, int64_t steps,
                  typename M::Acc* out, int64_t out_stride, bool accumulate) {
  using A = typename M::Acc;
  Vector<A> sum[I][V] = {};
  for (int64_t k = 0; k < steps; ++k) {
    typename M::Operand b[V];
    for (int v = 0; v < V; ++v) b[v] = load_raw<typename M::Operand>(packed + k * packed_stride + v * kLanes<A>);
    for (int i = 0; i < I; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = M::add_product(sum[i][v], x[i * kXRow + k * kXStep], b[v]);
  }
  for (int i = 0; i < I; ++i)
    for (int v = 0; v < V; ++v) {
      A* to = out + i * out_stride + v * kLanes<A>;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
}

// The same for `rows` rows, a multiple of kTile, and `width` columns, a multiple of the vector. A long sum is a sum of short ones,
// which keeps its rounding error near that of a vendor's GEMM.
template <class M, int64_t kXRow, int64_t kXStep>
void tile(const typename M::Element* x, const typename M::Element* packed, int64_t packed_stride, int64_t steps, typename M::Acc* out,
          int64_t out_stride, int64_t rows, int64_t width, bool accumulate) {
  constexpr int64_t lanes = kLanes<typename M::Acc>;
  int64_t c = 0;
  const auto sweep = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value, I = kTile / V;
    for (; c + V * lanes <= width; c += V * lanes)
      for (int64_t i = 0; i < rows; i += I)
        for (int64_t k = 0; k < steps; k += kShortSum)
          micro<M, I, V, kXRow, kXStep>(x + i * kXRow + k * kXStep, packed + k * packed_stride + c, packed_stride,
                                        min_of(kShortSum, steps - k), out + i * out_stride + c, out_stride, accumulate || k > 0);
  };
  sweep(std::integral_constant<int, 4>{});
  sweep(std::integral_constant<int, 2>{});
  sweep(std::integral_constant<int, 1>{});
}

// The keep-bits of the `count` lanes that start at `column`; reads no byte beyond them.
template <class A>
inline uint32_t keep_bits_part(const uint8_t* row, int64_t column, int64_t count) {
  uint32_t bits = row[column / 8];
  if (column % 8 + count > 8) bits |= static_cast<uint32_t>(row[column / 8 + 1]) << 8;
  return bits >> (column % 8);
}

// Asks for `columns` values from `row` on. Blocks are short pieces of long rows, which hardware prefetchers do not follow.
template <class T>
inline void prefetch(const T* row, int64_t columns) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < columns * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// The rows of a matrix, `stride` apart: all in turn, or those that an index names.
template <class T>
struct RowsAt {
  T* data;
  int64_t stride;
  const int64_t* index;
  T* at(int64_t row, int64_t column) const { return data + offset_of(index ? index[row] : row, stride, column); }
};

// The block at (row, column) of a matrix, masked: accumulators by row, zero beyond `columns` up to the next vector. The block that
// lies `rows_ahead` and `columns_ahead` further is asked for.
template <class T, class A>
void unpack(const RowsAt<const T>& from, int64_t first, int64_t column, int64_t rows, int64_t columns, int64_t rows_ahead,
            int64_t columns_ahead, const Mask& mask, A* to) {
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(from.at(first + i + rows_ahead, column + columns_ahead), columns);
    const T* row = from.at(first + i, column);
    const uint8_t* bits = mask.data ? mask.data + (first + i) * mask.stride : nullptr;
    A* out = to + i * kColumnChunk;
    int64_t c = 0;
    for (; c + kLanes<A> <= columns; c += kLanes<A>) {
      Vector<A> v = load(row + c);
      if (bits) v = keep<A>(v, keep_bits<A>(bits, column + c));
      store(out + c, v);
    }
    if (c < columns) {
      Vector<A> v = load_part(row + c, columns - c);
      if (bits) v = keep<A>(v, keep_bits_part<A>(bits, column + c, columns - c));
      store(out + c, v);
    }
  }
}

#ifdef __AVX512BF16__
// The same as bfloat16, zero beyond `columns` up to the next vector.
void unpack(const RowsAt<const bfloat16>& from, int64_t first, int64_t column, int64_t rows, int64_t columns, int64_t rows_ahead,
            int64_t columns_ahead, const Mask& mask, uint32_t* to) {
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(from.at(first + i + rows_ahead, column + columns_ahead), columns);
    const bfloat16* row = from.at(first + i, column);
    const uint8_t* bits = mask.data ? mask.data + (first + i) * mask.stride + column / 8 : nullptr;
    uint32_t* out = to + i * (kColumnChunk / 2);
    for (int64_t c = 0; c < columns; c += 32) {
      const int64_t count = min_of(32, columns - c);
      uint32_t kept = ~0u;
      if (count < 32) {
        kept = (1u << count) - 1;
        uint32_t drawn = ~0u;
        if (bits) std::memcpy(&drawn, bits + c / 8, static_cast<size_t>(ceil_div(count, 8)));
        kept &= drawn;
      } else if (bits) {
        std::memcpy(&kept, bits + c / 8, sizeof kept);
      }
      _mm512_storeu_si512(out + c / 2, _mm512_maskz_loadu_epi16(kept, row + c));
    }
  }
}

// Rows 2i and 2i + 1 of an unpacked block as pairs: [rows / 2][kColumnChunk].
void pair_rows(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t c = 0; c < columns; c += 32) {
      const __m512i a = _mm512_loadu_si512(from + i * (kColumnChunk / 2) + c / 2);
      const __m512i b = _mm512_loadu_si512(from + (i + 1) * (kColumnChunk / 2) + c / 2);
      const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
      _mm512_storeu_si512(to + (i / 2) * kColumnChunk + c, _mm512_permutex2var_epi64(even, low, odd));
      _mm512_storeu_si512(to + (i / 2) * kColumnChunk + c + 16, _mm512_permutex2var_epi64(even, high, odd));
    }
}
#endif

#ifdef __AVX512BF16__
// Rows [begin, end) of the packed form of a matrix whose lanes lie along the contraction, in elements of 32 bits: eight elements of sixteen
// lanes at a time.
template <class F>
void pack_words(const Matrix& from, Packed to, int64_t begin, int64_t end) {
  constexpr int64_t kShorts = sizeof(F) / 2;
  for (int64_t j = 0; j < from.lanes; j += 16)
    for (int64_t k = begin; k < end; k += 8) {
      const int64_t shorts = min_of(16, from.contraction * kShorts - 2 * k);
      const auto words = [&](int64_t lane) {
        if (lane >= from.lanes) return _mm256_setzero_si256();
        const char* at = static_cast<const char*>(from.data) + lane * from.lane_stride * static_cast<int64_t>(sizeof(F)) + 4 * k;
        return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << shorts) - 1), at);
      };
      __m512i block[8];
      for (int i = 0; i < 8; ++i) block[i] = _mm512_maskz_inserti64x4(0xff, _mm512_zextsi256_si512(words(j + i)), words(j + i + 8), 1);
      transpose<uint32_t>(block);
      uint32_t* out = static_cast<uint32_t*>(to.data) + k * to.stride + j;
      for (int64_t i = 0; i < min_of(8, end - k); ++i) _mm512_storeu_si512(out + i * to.stride, block[i]);
    }
}
#endif

// Rows [begin, end) of the packed form of a strided [contraction, lanes] matrix; lanes beyond its own are zero up to the next vector.
template <class M, class F>
void pack(const Matrix& from, Packed to, int64_t begin, int64_t end) {
  using E = typename M::Element;
#ifdef __AVX512BF16__
  if constexpr (sizeof(E) == 4 && M::step * sizeof(F) == 4) {
    if (from.stride == 1) return pack_words<F>(from, to, begin, end);
  }
#endif
  for (int64_t k = begin; k < end; ++k) {
    E* out = static_cast<E*>(to.data) + k * to.stride;
    const F* row = static_cast<const F*>(from.data) + k * M::step * from.stride;
    if (k * M::step + M::step <= from.contraction) {
      const F* next = row + from.stride;
      if (from.lane_stride == 1)
        for (int64_t j = 0; j < from.lanes; ++j) out[j] = M::element(row + j, next + j);
      else
        for (int64_t j = 0; j < from.lanes; ++j) out[j] = M::element(row + j * from.lane_stride, next + j * from.lane_stride);
    } else {
      for (int64_t j = 0; j < from.lanes; ++j) out[j] = M::template element<F>(row + j * from.lane_stride, nullptr);
    }
    std::memset(out + from.lanes, 0, static_cast<size_t>(round_up(from.lanes, kLanes<typename M::Acc>) - from.lanes) * sizeof(E));
  }
}

// Calls body(part, from, to) for the lanes [from, to) of each part that lie between `begin` and `end`.
template <class M, class Part, class Body>
void for_parts(const Part* parts, int64_t count, int64_t begin, int64_t end, const Body& body) {
  for (const Part* part = parts; part < parts + count; ++part) {
    const int64_t from = std::max(part->column, begin);
    const int64_t to = min_of(part->column + round_up(part->rank, kLanes<typename M::Acc>), end);
    if (from < to) body(*part, from, to);
  }
}

// S [rows, rank] for the up-projection: elements along the rank, [rows][rank / step].
template <class M>
void pack_ranks(const void* s, int64_t s_stride, int64_t rows, int64_t rank, Packed to) {
  const auto* from = static_cast<const typename M::Acc*>(s);
#ifdef __AVX512BF16__
  if constexpr (M::step == 2) {
    // Pairs along an even rank are the rounded numbers as they lie.
    if (rank % 2 == 0) {
      auto* out = static_cast<bfloat16*>(to.data);
      if (s_stride == rank) s_stride = rank *= rows, rows = 1;
      for (int64_t i = 0; i < rows; ++i, from += s_stride, out += rank) {
        int64_t j = 0;
        for (; j + kLanes<float> <= rank; j += kLanes<float>) store(out + j, load(from + j));
        for (; j < rank; ++j) put(out + j, from[j]);
      }
      return;
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i, from += s_stride) {
    auto* out = static_cast<typename M::Element*>(to.data) + i * to.stride;
    for (int64_t j = 0; j < rank; j += M::step) out[j / M::step] = M::element(from + j, j + 1 < rank ? from + j + 1 : nullptr);
  }
}

template <class M, class T>
void project(const ProjectTask& t, int64_t begin, int64_t end) {
  using A = typename M::Acc;
  using E = typename M::Element;
  constexpr int64_t kElements = kColumnChunk / M::step;
  alignas(64) E block[kRowBlock * kElements];
  alignas(64) A sums[kRowBlock * kRankBlock];
  const RowsAt<const T> x{static_cast<const T*>(t.x), t.x_stride, t.index};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kRowBlock, rows = min_of(kRowBlock, t.rows - first), padded = round_up(rows, kTile);
    std::memset(block + rows * kElements, 0, static_cast<size_t>((padded - rows) * kElements) * sizeof(E));
    for (int64_t j = 0; j < t.a.stride; j += kRankBlock) {
      const int64_t end_j = min_of(j + kRankBlock, t.a.stride);
      std::memset(sums, 0, sizeof sums);
      for (int64_t c = 0; c < t.features; c += kColumnChunk) {
        const int64_t columns = min_of(kColumnChunk, t.features - c);
        const auto products = [&](const Mask& mask, int64_t from, int64_t to) {
          unpack(x, first, c, rows, columns, 0, kColumnChunk, mask, block);
          tile<M, kElements, 1>(block, static_cast<const E*>(t.a.data) + (c / M::step) * t.a.stride + from, t.a.stride,
                                ceil_div(columns, M::step), sums + (from - j), kRankBlock, padded, to - from, true);
        };
        if (!t.parts->mask.data) {
          products(t.parts->mask, j, end_j);
          continue;
        }
        for_parts<M>(t.parts, t.count, j, end_j, [&](const ProjectPart& part, int64_t from, int64_t to) {
          if (t.draw && from == part.column)
            for (int64_t i = first; i < first + rows; ++i)
              dropout_bytes(part.seed, i, c / 8, ceil_div(columns, 8), t.threshold, part.mask.data + i * part.mask.stride + c / 8);
          products(part.mask, from, to);
        });
      }
      for_parts<M>(t.parts, t.count, j, end_j, [&](const ProjectPart& part, int64_t from, int64_t to) {
        to = min_of(to, part.column + part.rank);
        for (int64_t i = 0; i < rows; ++i) {
          A* s = static_cast<A*>(part.s) + (first + i) * t.s_stride - part.column;
          for (int64_t k = from; k < to; ++k) s[k] = static_cast<A>(part.factor) * sums[i * kRankBlock + k - j];
        }
      });
    }
  }
}

// I rows and V vectors of Y; the last vector holds `last` columns. kParts: several parts with a mask each, whose sums are added beside
// the one in the registers; without masks all parts go into that one.
template <class M, class T, int I, int V, bool kParts>
inline void expand_tile(const ExpandTask& t, int64_t row, int64_t column, int64_t last) {
  using A = typename M::Acc;
  using E = typename M::Element;
  Vector<A> sum[I][V] = {};
  [[maybe_unused]] Vector<A> total[kParts ? I : 1][kParts ? V : 1] = {};
  const RowsAt<T> rows{static_cast<T*>(t.y), t.y_stride, t.index};
  for (int i = 0; i < I; ++i) prefetch(rows.at(row + I + i, column), V * kLanes<A>);
  for (const ExpandPart* part = t.parts; part < t.parts + t.count; ++part) {
    const E* s = static_cast<const E*>(part->s) + row * part->s_stride;
    const E* b = static_cast<const E*>(part->b.data) + column;
    for (int64_t k = 0; k < part->depth; ++k) {
      typename M::Operand operand[V];
      for (int v = 0; v < V; ++v) operand[v] = load_raw<typename M::Operand>(b + k * part->b.stride + v * kLanes<A>);
      for (int i = 0; i < I; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = M::add_product(sum[i][v], s[i * part->s_stride + k], operand[v]);
    }
    if (!part->mask.data) continue;
    for (int i = 0; i < I; ++i) {
      const uint8_t* bits = part->mask.data + (row + i) * part->mask.stride;
      for (int v = 0; v < V; ++v) {
        const int64_t c = column + v * kLanes<A>;
        sum[i][v] = keep<A>(sum[i][v], v + 1 < V || last == kLanes<A> ? keep_bits<A>(bits, c) : keep_bits_part<A>(bits, c, last));
        if constexpr (kParts) {
          total[i][v] += sum[i][v];
          sum[i][v] = part + 1 < t.parts + t.count ? Vector<A>{} : total[i][v];
        }
      }
    }
  }
  for (int i = 0; i < I; ++i) {
    T* y = rows.at(row + i, column);
    for (int v = 0; v < V; ++v) {
      const int64_t c = v * kLanes<A>;
      if (v + 1 < V || last == kLanes<A>)
        store(y + c, load(y + c) + sum[i][v]);
      else
        store_part(y + c, load_part(y + c, last) + sum[i][v], last);
    }
  }
}

template <class M, class T, bool kParts>
void expand_blocks(const ExpandTask& t, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<typename M::Acc>;
  constexpr int kRows = kTile / 4;
  const int64_t column_tasks = ceil_div(t.features, kExpandColumns);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / column_tasks * kRowBlock, row_end = min_of(row + kRowBlock, t.rows);
    const int64_t column = task % column_tasks * kExpandColumns, column_end = min_of(column + kExpandColumns, t.features);
    for (int64_t chunk = column; chunk < column_end; chunk += kColumnChunk) {
      const int64_t chunk_end = min_of(chunk + kColumnChunk, column_end);
      const auto strip = [&](auto rows, int64_t i) {
        constexpr int I = decltype(rows)::value;
        int64_t c = chunk;
        for (; c + 4 * lanes <= chunk_end; c += 4 * lanes) expand_tile<M, T, I, 4, kParts>(t, i, c, lanes);
        for (; c < chunk_end; c += lanes) expand_tile<M, T, I, 1, kParts>(t, i, c, min_of(lanes, chunk_end - c));
      };
      int64_t i = row;
      for (; i + kRows <= row_end; i += kRows) strip(std::integral_constant<int, kRows>{}, i);
      for (; i < row_end; ++i) strip(std::integral_constant<int, 1>{}, i);
    }
  }
}

template <class M, class T>
void expand(const ExpandTask& t, int64_t begin, int64_t end) {
  (t.count > 1 && t.parts->mask.data ? expand_blocks<M, T, true> : expand_blocks<M, T, false>)(t, begin, end);
}

template <class M, class T, class F>
void gradient(const GradientTask& t, int64_t begin, int64_t end) {
  using A = typename M::Acc;
  using E = typename M::Element;
  constexpr int64_t kElements = kColumnChunk / M::step;
  const int64_t padded_rows = round_up(t.rows, kRowBlock);
  alignas(64) E block[kRowBlock * kElements];
  alignas(64) E pairs[M::step == 1 ? 1 : kRowBlock * kColumnChunk / 2];
  alignas(64) A sums[kColumnChunk * kRankBlock];
  const RowsAt<const T> g{static_cast<const T*>(t.g), t.g_stride, t.index};
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * t.panel, columns = min_of(t.panel, t.features - column), padded_columns = round_up(columns, kTile);
    for (int64_t j = 0; j < t.width; j += kRankBlock) {
      const int64_t end_j = min_of(j + kRankBlock, t.width);
      std::memset(sums, 0, sizeof sums);
      for (int64_t row = 0; row < t.rows; row += kRowBlock) {
        const int64_t rows = min_of(kRowBlock, t.rows - row), padded = round_up(rows, kTile);
        const auto products = [&](const Mask& mask, int64_t from, int64_t to) {
          unpack(g, row, column, rows, columns, kRowBlock, 0, mask, block);
          if (rows < padded) std::memset(block + rows * kElements, 0, static_cast<size_t>((padded - rows) * kElements) * sizeof(E));
          if (t.b.data)
            tile<M, kElements, 1>(block, static_cast<const E*>(t.b.data) + (column / M::step) * t.b.stride + from, t.b.stride,
                                  ceil_div(columns, M::step), static_cast<A*>(t.partials) + (panel * padded_rows + row) * t.width + from,
                                  t.width, padded, to - from, false);
          if (t.count) {
            const E* by_column = block;
            if constexpr (M::step == 2) {
              pair_rows(block, padded, columns, pairs);
              by_column = pairs;
            }
            tile<M, 1, kColumnChunk>(by_column, static_cast<const E*>(t.s.data) + (row / M::step) * t.s.stride + from, t.s.stride,
                                     ceil_div(rows, M::step), sums + (from - j), kRankBlock, padded_columns, to - from, true);
          }
        };
        if (t.count && t.parts->mask.data)
          for_parts<M>(t.parts, t.count, j, end_j,
                       [&](const GradientPart& part, int64_t from, int64_t to) { products(part.mask, from, to); });
        else
          products(Mask{nullptr, 0}, j, end_j);
      }
      for_parts<M>(t.parts, t.count, j, end_j, [&](const GradientPart& part, int64_t from, int64_t to) {
        to = min_of(to, part.column + part.rank);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t k = from; k < to; ++k)
            put(static_cast<F*>(part.gradient) + (column + c) * part.feature_stride + (k - part.column) * part.rank_stride,
                sums[c * kRankBlock + k - j]);
      });
    }
  }
}

template <class A>
void reduce(const void* partials, int64_t panels, int64_t panel_stride, int64_t padded_rank, int64_t rank, double factor, void* s,
            int64_t s_stride, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < padded_rank; j += kLanes<A>) {
      Vector<A> sum{};
      for (int64_t panel = 0; panel < panels; ++panel)
        sum += load(static_cast<const A*>(partials) + panel * panel_stride + i * padded_rank + j);
      sum *= static_cast<A>(factor);
      A* out = static_cast<A*>(s) + i * s_stride + j;
      if (j + kLanes<A> <= rank)
        store(out, sum);
      else
        store_part(out, sum, rank - j);
    }
}

// sum[i][j] += products along rows of the features: I weight rows, J tokens.
template <class T, class W, int I, int J>
inline void row_products(const W* weight, int64_t weight_stride, const T* x, int64_t x_stride, int64_t features,
                         Vector<Accumulator<T>>* sums, int64_t sums_stride) {
  using A = Accumulator<T>;
  Vector<A> sum[I][J];
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) sum[i][j] = sums[i * sums_stride + j];
  int64_t k = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16>) {
    const auto step = [&](auto take) {
      __m512bh operand[J];
      for (int j = 0; j < J; ++j) operand[j] = (__m512bh)take(x + j * x_stride + k);
      for (int i = 0; i < I; ++i) {
        const __m512bh w = (__m512bh)take(weight + i * weight_stride + k);
        for (int j = 0; j < J; ++j) sum[i][j] = (Vector<float>)_mm512_dpbf16_ps((__m512)sum[i][j], w, operand[j]);
      }
    };
    for (; k + 32 <= features; k += 32) step([](const bfloat16* from) { return _mm512_loadu_si512(from); });
    if (k < features) {
      const __mmask32 rest = (1u << (features - k)) - 1;
      step([rest](const bfloat16* from) { return _mm512_maskz_loadu_epi16(rest, from); });
      k = features;
    }
  }
#endif
  for (; k + kLanes<A> <= features; k += kLanes<A>) {
    Vector<A> operand[J];
    for (int j = 0; j < J; ++j) operand[j] = load(x + j * x_stride + k);
    for (int i = 0; i < I; ++i) {
      const Vector<A> w = load(weight + i * weight_stride + k);
      for (int j = 0; j < J; ++j) sum[i][j] += w * operand[j];
    }
  }
  if (k < features)
    for (int i = 0; i < I; ++i) {
      const Vector<A> w = load_part(weight + i * weight_stride + k, features - k);
      for (int j = 0; j < J; ++j) sum[i][j] += w * load_part(x + j * x_stride + k, features - k);
    }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) sums[i * sums_stride + j] = sum[i][j];
}

// The same for any number of weight rows up to kSmallBlock and of tokens up to kSmallRows, in register tiles.
template <class T, class W>
inline void block_products(const W* weight, int64_t weight_stride, int64_t weight_rows, const T* x, int64_t x_stride, int64_t rows,
                           int64_t features, Vector<Accumulator<T>>* sums) {
  constexpr int I = 4, J = kTile / 4;
  if (weight_rows == kSmallBlock && rows == 1)
    return row_products<T, W, kSmallBlock, 1>(weight, weight_stride, x, x_stride, features, sums, kSmallRows);
  const auto strip = [&](auto count, int64_t i) {
    constexpr int N = decltype(count)::value;
    int64_t j = 0;
    for (; j + J <= rows; j += J)
      row_products<T, W, N, J>(weight + i * weight_stride, weight_stride, x + j * x_stride, x_stride, features, sums + i * kSmallRows + j,
                               kSmallRows);
    for (; j < rows; ++j)
      row_products<T, W, N, 1>(weight + i * weight_stride, weight_stride, x + j * x_stride, x_stride, features, sums + i * kSmallRows + j,
                               kSmallRows);
  };
  int64_t i = 0;
  for (; i + I <= weight_rows; i += I) strip(std::integral_constant<int, I>{}, i);
  for (; i < weight_rows; ++i) strip(std::integral_constant<int, 1>{}, i);
}

// W: storage of the weight, F: of lora_b, Y: of the result.
template <class T, class W, class F, class Y>
void small(const SmallTask& t, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t piece = small_piece(t.rows, t.features, sizeof(T));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task * kSmallBlock, weight_rows = min_of(kSmallBlock, t.out_features - n);
    const W* weight = static_cast<const W*>(t.weight) + n * t.weight_stride;
    Vector<A> sums[kSmallBlock * kSmallRows] = {};
    for (int64_t k = 0; k < t.features; k += piece) {
      const int64_t columns = min_of(piece, t.features - k);
      if (k + piece < t.features)
        for (int64_t i = 0; i < weight_rows; ++i) prefetch(weight + i * t.weight_stride + k + piece, columns);
      block_products<T, W>(weight + k, t.weight_stride, weight_rows, static_cast<const T*>(t.x) + k * t.rows, columns, t.rows, columns,
                           sums);
    }
    if (t.s)
      block_products<A, F>(static_cast<const F*>(t.b) + n * t.b_stride, t.b_stride, weight_rows, static_cast<const A*>(t.s), t.rank, t.rows,
                           t.rank, sums);
    for (int64_t k = 0; k < t.run_count; ++k) {
      const SmallRun& run = t.runs[k];
      block_products<A, F>(static_cast<const F*>(run.b) + n * t.b_stride, t.b_stride, weight_rows, static_cast<const A*>(run.s), run.rank,
                           run.rows, run.rank, sums + run.first);
    }
    for (int64_t i = 0; i < weight_rows; ++i) {
      A totals[kSmallRows];
      if (t.rows > 1)
        sum_each<A>(sums + i * kSmallRows, t.rows, totals);
      else
        totals[0] = sum_lanes(sums[i * kSmallRows]);
      for (int64_t j = 0; j < t.rows; ++j) {
        A value = static_cast<A>(t.factor) * totals[j];
        if (t.bias) value += one(static_cast<const T*>(t.bias) + n + i);
        put(static_cast<Y*>(t.y) + j * t.out_features + n + i, value);
      }
    }
  }
}

template <class M, class T, class F>
constexpr Kernels make() {
  using A = typename M::Acc;
  return {M::arithmetic, M::step,      sizeof(typename M::Element), kLanes<A>, pack<M, F>,        pack<M, A>,       pack_ranks<M>,
          project<M, T>, expand<M, T>, gradient<M, T, F>,           reduce<A>, small<T, T, F, T>, small<T, F, F, A>};
}

const Kernels& find(Storage x, Storage factors) {
#ifdef __AVX512BF16__
  using Bf16 = Dot;
#else
  using Bf16 = Wide<float>;
#endif
  static constexpr Kernels single = make<Wide<float>, float, float>(), twice = make<Wide<double>, double, double>(),
                           bf16 = make<Bf16, bfloat16, bfloat16>(), bf16_mixed = make<Wide<float>, bfloat16, float>(),
                           half = make<Wide<float>, float16, float16>(), half_mixed = make<Wide<float>, float16, float>();
  switch (x) {
    case Storage::float64: return twice;
    case Storage::bfloat16: return factors == Storage::bfloat16 ? bf16 : bf16_mixed;
    case Storage::float16: return factors == Storage::float16 ? half : half_mixed;
    default: return single;
  }
}

}  // namespace

const LevelKernels& PEFTOPS_LEVEL_KERNELS() {
  static constexpr LevelKernels kernels{find, dropout_bytes};
  return kernels;
}

}  // namespace peftops::lora
