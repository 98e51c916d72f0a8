// The fused skinny linear: out = epilogue(weight · prologue(x)) for few rows of x (decode).
//
//   features (m, k)   x, or RMSNorm(x)·γ rounded to the type of x; written once by prepare_features
//   sums     (m, n)   features · weightᵀ, float32 products and sums
//   out      (m, n)   sums + bias + residual, or silu(gate sums) · up sums
//
// Quantized weights become numbers of the features' type, exactly, on their way into the registers;
// scales by row multiply the sums, scales of groups (int4) the sum or the numbers of each group.
//
// With few rows the time is that of reading the weight once, so the loops are arranged for memory:
//
//   weight  ┌─────────────── k ───────────────┐
//   tile    │ 4 rows, read together: each     │  4 × kTileM accumulators, features from L1
//           │ feature vector is used 4 times  │
//   next    │ prefetched meanwhile, in the    │  in address order, one stream per thread:
//   tile    │ order of its addresses          │  that is what the memory controller likes best
//           └─────────────────────────────────┘
//
// More than kTileM rows of x pass over the tile again while it is in the cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nbl {
namespace NBL_ISA {

#if defined(NBL_AVX512)
constexpr int kTileM = 6;  // 4 × 6 accumulators + 4 weights + 1 feature vector of 32 registers
#elif defined(NBL_AVX2)
constexpr int kTileM = 2;  // 4 × 2 + 4 + 1 of 16
#else
constexpr int kTileM = 1;
#endif
constexpr int kTileRows = 4;
constexpr int kBlockN = 32;  // outputs between two epilogues: long enough to vectorize them

// How weights stored as W meet features of type Feature: kStep of them at a time. Row is where a
// row of the weight begins. This one: as floats.
template <class F, class W>
struct Dot {
  using Feature = F;
  using Row = const W*;
  using Weights = Vec;
  using Features = Vec;
  static constexpr int kStep = Vec::kWidth;
  static constexpr int kLine = 64 / sizeof(W);  // weights in a cache line
  static constexpr bool kPadded = false;        // rows end with a whole step
  static Row row(const SkinnyLinear& p, int64_t n) {
    return static_cast<const W*>(p.weight) + n * p.weight_stride;
  }
  static const char* address(Row row) { return reinterpret_cast<const char*>(row); }
  static Weights load_weights(Row row, int64_t k) { return Vec::load(row + k); }
  static Weights load_weights_partial(Row row, int64_t k, int64_t count) {
    return load_partial(row + k, count);
  }
  static Features load_features(const F* p) { return Vec::load(p); }
  static Vec multiply_add(Weights w, Features f, Vec acc) { return fma(w, f, acc); }
};

struct Int4Row {
  const uint8_t* bytes;
  const bfloat16* scales;
};

inline Int4Row int4_row(const void* weight, int64_t stride, const void* scales, int64_t k,
                        int64_t n) {
  return {static_cast<const uint8_t*>(weight) + n * stride,
          static_cast<const bfloat16*>(scales) + n * ((k + kInt4Group - 1) / kInt4Group)};
}

// Eight of 4 bits times eight of 8 bits: a weight and its scale make an exact float.
template <class F>
struct Dot<F, int4_group> {
  using Feature = F;
  using Row = Int4Row;
  static constexpr int kStep = 32;  // one nibble of each word
  static constexpr int kVecs = kStep / Vec::kWidth;
  struct Weights {
    Vec v[kVecs];
  };
  using Features = Weights;
  static constexpr int kLine = kInt4Group;
  static constexpr bool kPadded = true;
  static Row row(const SkinnyLinear& p, int64_t n) {
    return int4_row(p.weight, p.weight_stride, p.weight_scale, p.k, n);
  }
  static const char* address(Row row) { return reinterpret_cast<const char*>(row.bytes); }
  static Weights load_weights(Row row, int64_t k) {
    const uint8_t* words = row.bytes + k / kInt4Group * int64_t{sizeof(int4_group)};
    const float scale = to_float(row.scales[k / kInt4Group]);
    const int nibble = static_cast<int>(k % kInt4Group / 32);
    Weights w;
#if defined(NBL_AVX512)
    const __m512 table =
        _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7),
                      _mm512_set1_ps(scale));
    const __m512i shift = _mm512_set1_epi32(4 * nibble);
    for (int i = 0; i < kVecs; ++i) {  // the look-up sees the lowest four bits only
      const __m512i wide =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(words + 32 * i)));
      w.v[i] = {_mm512_permutexvar_ps(_mm512_srlv_epi32(wide, shift), table)};
    }
#elif defined(NBL_AVX2)
    const __m256 scales = _mm256_set1_ps(scale), zero = _mm256_set1_ps(-8.0f * scale);
    const __m128i shift = _mm_cvtsi32_si128(4 * nibble);
    for (int i = 0; i < kVecs; ++i) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(words + 16 * i)));
      const __m256i bits = _mm256_and_si256(_mm256_srl_epi32(wide, shift), _mm256_set1_epi32(15));
      w.v[i] = {_mm256_fmadd_ps(_mm256_cvtepi32_ps(bits), scales, zero)};
    }
#else
    int4_group group;
    std::memcpy(&group, words, sizeof group);
    for (int i = 0; i < kStep; ++i)
      w.v[i / Vec::kWidth].v[i % Vec::kWidth] =
          static_cast<float>(int4_at(group, 32 * nibble + i)) * scale;
#endif
    return w;
  }
  static Features load_features(const F* p) {
    Features f;
    for (int i = 0; i < kVecs; ++i) f.v[i] = Vec::load(p + i * Vec::kWidth);
    return f;
  }
  static Vec multiply_add(const Weights& w, const Features& f, Vec acc) {
    for (int i = 0; i < kVecs; ++i) acc = fma(w.v[i], f.v[i], acc);
    return acc;
  }
};

#if defined(NBL_AVX512_BF16)
// The bf16 numbers of the magnitudes of a byte, 0 to 127, as low and as high bytes.
struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
};

constexpr ByteTable byte_table(bool fp8) {
  ByteTable table{};
  for (int i = 0; i < 128; ++i) {
    int bits = 0, exponent = 0;  // of the integer i
    while (i >> (exponent + 1)) ++exponent;
    if (i) bits = ((127 + exponent) << 7) + ((i << 7 >> exponent) & 127);
    if (fp8 && i == 127) bits = 0x7fc0;                      // NaN
    if (fp8 && i < 8 && i) bits -= 9 << 7;                   // subnormal: that many 2^-9
    if (fp8 && i >= 8 && i < 127) bits = (i << 4) + 0x3c00;  // exponent bias 7 to 127
    table.low[i] = static_cast<uint8_t>(bits & 255);
    table.high[i] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}

template <class W>
inline constexpr ByteTable kByteTable = byte_table(std::is_same_v<W, float8_e4m3>);

// A line of weights as pairs of bf16, which is exact: bytes are looked up by their lowest 7 bits.
template <class W>
struct Pairs {
  static constexpr int kParts = 2 / sizeof(W);
  __m512bh part[kParts];

  static Pairs load(const W* p) {
    const __m512i line = _mm512_loadu_si512(p);
    if constexpr (kParts == 1) {
      return {{(__m512bh)line}};
    } else {
      // So that what the unpacking below takes from the lanes of 16 bytes is in order.
      const __m512i bytes =
          _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), line);
      const __m512i index = std::is_same_v<W, int8_t> ? _mm512_abs_epi8(bytes) : bytes;
      const auto look_up = [&](const uint8_t* table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), index,
                                        _mm512_load_si512(table + 64));
      };
      constexpr int kOrAnd = 0xf8;  // a | (b & c)
      const __m512i low = look_up(kByteTable<W>.low);
      const __m512i high = _mm512_ternarylogic_epi32(look_up(kByteTable<W>.high), bytes,
                                                     _mm512_set1_epi8((char)0x80), kOrAnd);
      return {
          {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)}};
    }
  }
};

template <class W>
struct Dot<bfloat16, W> {
  using Feature = bfloat16;
  using Row = const W*;
  using Weights = Pairs<W>;
  static constexpr int kStep = 64 / sizeof(W);
  static constexpr int kLine = kStep;
  static constexpr bool kPadded = false;
  struct Features {
    __m512bh part[Weights::kParts];
  };
  static Row row(const SkinnyLinear& p, int64_t n) {
    return static_cast<const W*>(p.weight) + n * p.weight_stride;
  }
  static const char* address(Row row) { return reinterpret_cast<const char*>(row); }
  static Weights load_weights(Row row, int64_t k) { return Weights::load(row + k); }
  static Weights load_weights_partial(Row row, int64_t k, int64_t count) {
    W padded[kStep] = {};
    std::memcpy(padded, row + k, count * sizeof(W));
    return Weights::load(padded);
  }
  static Features load_features(const bfloat16* p) {
    Features f;
    for (int i = 0; i < Weights::kParts; ++i) f.part[i] = Pairs<bfloat16>::load(p + 32 * i).part[0];
    return f;
  }
  static Vec multiply_add(const Weights& w, const Features& f, Vec acc) {
    for (int i = 0; i < Weights::kParts; ++i) acc.v = _mm512_dpbf16_ps(acc.v, w.part[i], f.part[i]);
    return acc;
  }
};

template <>
struct Dot<bfloat16, int4_group> {  // a group at a time, its sum times its scale
  using Feature = bfloat16;
  using Row = Int4Row;
  static constexpr int kStep = kInt4Group;
  struct Weights {
    __m512bh nibble[4];
    Vec scale;
  };
  struct Features {
    __m512bh part[4];
  };
  static constexpr int kLine = kInt4Group;
  static constexpr bool kPadded = true;
  static Row row(const SkinnyLinear& p, int64_t n) {
    return int4_row(p.weight, p.weight_stride, p.weight_scale, p.k, n);
  }
  static const char* address(Row row) { return reinterpret_cast<const char*>(row.bytes); }
  static Weights load_weights(Row row, int64_t k) {
    const int64_t group = k / kInt4Group;
    const __m512i words = _mm512_loadu_si512(row.bytes + group * int64_t{sizeof(int4_group)});
    // -8 to 7 in bf16, twice: the look-up sees five bits, of which the highest does not matter.
    const __m256i numbers = _mm256_setr_epi16(
        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
        (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const __m512i table = _mm512_broadcast_i64x4(numbers);
    const auto look_up = [&](__m512i index) {
      return (__m512bh)_mm512_permutexvar_epi16(index, table);
    };
    return {{look_up(words), look_up(_mm512_srli_epi16(words, 4)),
             look_up(_mm512_srli_epi16(words, 8)), look_up(_mm512_srli_epi16(words, 12))},
            {_mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_set1_epi16((short)row.scales[group].bits), 16))}};
  }
  static Features load_features(const bfloat16* p) {
    Features f;
    for (int i = 0; i < 4; ++i) f.part[i] = Pairs<bfloat16>::load(p + 32 * i).part[0];
    return f;
  }
  static Vec multiply_add(const Weights& w, const Features& f, Vec acc) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) sum = _mm512_dpbf16_ps(sum, w.nibble[i], f.part[i]);
    return fma({sum}, w.scale, acc);
  }
};
#endif

// Features are floats, or bf16 where the processor multiplies them.
template <class T>
struct FeatureOf {
  using Type = float;
};
#if defined(NBL_AVX512_BF16)
template <>
struct FeatureOf<bfloat16> {
  using Type = bfloat16;
};
#endif
template <class T, class W>
using DotOf = Dot<typename FeatureOf<T>::Type, W>;

// Whether the sums are to be scaled by row.
template <class W>
constexpr bool kRowScale = std::is_same_v<W, int8_t> || std::is_same_v<W, float8_e4m3>;

// Rows of features take an odd number of cache lines: with a power of two, the same column of all
// rows would compete for the same few places of the first-level cache.
template <class D>
int64_t padded_k(int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(typename D::Feature), kStep = D::kStep > 32 ? D::kStep : 32;
  return ((k + kStep - 1) / kStep * kStep / kLine | 1) * kLine;
}

// One row: x, or x / sqrt(mean(x²) + eps) · γ rounded to T, as type Out. Zeros up to `padded`.
template <class T, class Out>
void prepare_row(const T* x, int64_t k, int64_t padded, const T* norm_weight, float eps, Out* out) {
  const int64_t whole = k - k % Vec::kWidth;
  Vec scale = Vec::broadcast(1.0f);
  if (norm_weight) {
    Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    int64_t i = 0;
    for (; i + 4 * Vec::kWidth <= k; i += 4 * Vec::kWidth) {
      for (int u = 0; u < 4; ++u) {
        const Vec v = Vec::load(x + i + u * Vec::kWidth);
        sums[u] = fma(v, v, sums[u]);
      }
    }
    for (; i < k; i += Vec::kWidth) {
      const Vec v = i < whole ? Vec::load(x + i) : load_partial(x + i, k - i);
      sums[0] = fma(v, v, sums[0]);
    }
    const float mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum() / static_cast<float>(k);
    scale = Vec::broadcast(1.0f / std::sqrt(mean + eps));
  }
  for (int64_t i = 0; i < k; i += Vec::kWidth) {
    const bool full = i < whole;
    Vec v = full ? Vec::load(x + i) : load_partial(x + i, k - i);
    if (norm_weight) {
      v = v * scale * (full ? Vec::load(norm_weight + i) : load_partial(norm_weight + i, k - i));
    }
    T rounded[Vec::kWidth];
    v.store(rounded);
    if (full) {
      if constexpr (std::is_same_v<Out, T>) {
        v.store(out + i);
      } else {
        Vec::load(rounded).store(out + i);
      }
    } else {
      for (int64_t j = i; j < k; ++j) {
        if constexpr (std::is_same_v<Out, T>) {
          out[j] = rounded[j - i];
        } else {
          out[j] = to_float(rounded[j - i]);
        }
      }
    }
  }
  for (int64_t i = k; i < padded; ++i) out[i] = Out{};
}

template <class T, class W>
void prepare_features(const SkinnyLinear& p, void* features, int64_t begin, int64_t end) {
  using D = DotOf<T, W>;
  using Feature = typename D::Feature;
  const int64_t padded = padded_k<D>(p.k);
  for (int64_t i = begin; i < end; ++i) {
    prepare_row(static_cast<const T*>(p.x) + i * p.x_stride, p.k, padded,
                static_cast<const T*>(p.norm_weight), p.norm_eps,
                static_cast<Feature*>(features) + i * padded);
  }
}

// sums[i][r] = Σ_k features[i][k] · rows[r][k] for kM rows of features and a tile of the weight.
// `next` holds the start of the following tile, in kGroups pieces of equally many adjacent rows.
template <class D, int kM, int kGroups>
[[gnu::noinline]] inline void dot_tile(const typename D::Row rows[kTileRows],
                                       const typename D::Feature* features, int64_t padded,
                                       int64_t k, const char* const next[kGroups], float* sums,
                                       int64_t sums_stride) {
  constexpr int kLines =
      kTileRows / kGroups;  // cache lines to prefetch per piece and line of a row
  Vec acc[kM][kTileRows];
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileRows; ++r) acc[i][r] = Vec::zero();

  const int64_t whole = (D::kPadded ? k + D::kStep - 1 : k) / D::kStep * D::kStep;
  int64_t position = 0;
  for (int64_t j = 0; j < whole; j += D::kStep) {
    typename D::Weights w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = D::load_weights(rows[r], j);
    if (next && j % D::kLine == 0) {
      for (int g = 0; g < kGroups; ++g)
        for (int line = 0; line < kLines; ++line)
          __builtin_prefetch(next[g] + position + line * 64, 0, 2);
      position += kLines * 64;
    }
    for (int i = 0; i < kM; ++i) {
      const auto f = D::load_features(features + i * padded + j);
      for (int r = 0; r < kTileRows; ++r) acc[i][r] = D::multiply_add(w[r], f, acc[i][r]);
    }
  }
  if constexpr (!D::kPadded) {
    if (whole < k) {
      typename D::Weights w[kTileRows];
      for (int r = 0; r < kTileRows; ++r) w[r] = D::load_weights_partial(rows[r], whole, k - whole);
      for (int i = 0; i < kM; ++i) {
        const auto f = D::load_features(features + i * padded + whole);
        for (int r = 0; r < kTileRows; ++r) acc[i][r] = D::multiply_add(w[r], f, acc[i][r]);
      }
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileRows; ++r) sums[i * sums_stride + r] = acc[i][r].sum();
}

template <class D, int kGroups>
inline void dot_tile_any_m(int m, const typename D::Row rows[kTileRows],
                           const typename D::Feature* features, int64_t padded, int64_t k,
                           const char* const next[kGroups], float* sums, int64_t sums_stride) {
  // Rows of x in equal passes of at most kTileM; only the first one prefetches.
  const int passes = (m + kTileM - 1) / kTileM;
  for (int pass = 0, i = 0; pass < passes; ++pass) {
    const int count = (m - i + (passes - pass) - 1) / (passes - pass);
    const auto* f = features + i * padded;
    const char* const* prefetch = pass == 0 ? next : nullptr;
    float* s = sums + i * sums_stride;
    switch (count) {
      case 1:
        dot_tile<D, 1, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#if defined(NBL_AVX2) || defined(NBL_AVX512)
      case 2:
        dot_tile<D, 2, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#endif
#if defined(NBL_AVX512)
      case 3:
        dot_tile<D, 3, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 4:
        dot_tile<D, 4, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 5:
        dot_tile<D, 5, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 6:
        dot_tile<D, 6, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#endif
      default:
        break;
    }
    i += count;
  }
}

// Outputs [begin, end) of every row. `features` is what prepare_features wrote.
template <class T, class W>
void linear_columns(const SkinnyLinear& p, const void* prepared, int64_t begin, int64_t end) {
  using D = DotOf<T, W>;
  const auto* features = static_cast<const typename D::Feature*>(prepared);
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t padded = padded_k<D>(p.k);
  float sums[kSkinnyRows][kBlockN + kTileRows];
  for (int64_t block = begin; block < end; block += kBlockN) {
    const int64_t count = std::min<int64_t>(kBlockN, end - block);
    for (int64_t n = 0; n < count; n += kTileRows) {
      typename D::Row rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r)  // past the end: the last row again, its sum is not used
        rows[r] = D::row(p, std::min(block + n + r, end - 1));
      const char* next[1] = {D::address(D::row(p, block + n + kTileRows))};
      dot_tile_any_m<D, 1>(static_cast<int>(p.m), rows, features, padded, p.k, next, &sums[0][n],
                           kBlockN + kTileRows);
    }
    for (int64_t i = 0; i < p.m; ++i) {
      T* out = static_cast<T*>(p.out) + i * p.out_stride + block;
      float* s = sums[i];
      if constexpr (kRowScale<W>) {
        const float* scale = static_cast<const float*>(p.weight_scale) + block;
        for (int64_t n = 0; n < count; ++n) s[n] *= scale[n];
      }
      if (bias)
        for (int64_t n = 0; n < count; ++n) s[n] += to_float(bias[block + n]);
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + i * p.residual_stride + block;
        for (int64_t n = 0; n < count; ++n) s[n] += to_float(residual[n]);
      }
      for (int64_t n = 0; n < count; ++n) out[n] = from_float<T>(s[n]);
    }
  }
}

// The same for weight = (2n, k), n gate rows and then n up rows: out = silu(gate) · up.
template <class T, class W>
void swiglu_columns(const SkinnyLinear& p, const void* prepared, int64_t begin, int64_t end) {
  using D = DotOf<T, W>;
  constexpr int kHalf = kTileRows / 2;
  constexpr int kStride = 2 * kBlockN + kTileRows;
  const auto* features = static_cast<const typename D::Feature*>(prepared);
  const int64_t padded = padded_k<D>(p.k);
  float sums[kSkinnyRows][kStride];  // gate, gate, up, up, gate, gate, …
  for (int64_t block = begin; block < end; block += kBlockN) {
    const int64_t count = std::min<int64_t>(kBlockN, end - block);
    for (int64_t n = 0; n < count; n += kHalf) {
      const int64_t first = block + n, second = std::min(block + n + 1, end - 1);
      const typename D::Row rows[kTileRows] = {D::row(p, first), D::row(p, second),
                                               D::row(p, p.n + first), D::row(p, p.n + second)};
      const char* next[2] = {D::address(D::row(p, first + kHalf)),
                             D::address(D::row(p, p.n + first + kHalf))};
      dot_tile_any_m<D, 2>(static_cast<int>(p.m), rows, features, padded, p.k, next,
                           &sums[0][2 * n], kStride);
    }
    for (int64_t i = 0; i < p.m; ++i) {
      T* out = static_cast<T*>(p.out) + i * p.out_stride + block;
      float gates[kBlockN], ups[kBlockN];
      for (int64_t n = 0; n < count; ++n) {
        const float* tile = sums[i] + 2 * (n - n % kHalf) + n % kHalf;
        gates[n] = tile[0];
        ups[n] = tile[kHalf];
      }
      if constexpr (kRowScale<W>) {
        const float* scale = static_cast<const float*>(p.weight_scale) + block;
        for (int64_t n = 0; n < count; ++n) {
          gates[n] *= scale[n];
          ups[n] *= scale[p.n + n];
        }
      }
      for (int64_t n = 0; n < count; ++n) out[n] = from_float<T>(silu(gates[n]) * ups[n]);
    }
  }
}

template <class T>
void rms_norm_rows(const RowNorm& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    prepare_row(static_cast<const T*>(p.x) + i * p.x_stride, p.k, p.k,
                static_cast<const T*>(p.norm_weight), p.norm_eps, static_cast<T*>(p.out) + i * p.k);
  }
}

template <class T>
void residual_rows(const ResidualRows& p, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t i = begin; i < end; ++i) {
    const T* residual = static_cast<const T*>(p.residual) + i * p.residual_stride;
    T* out = static_cast<T*>(p.out) + i * p.n;
    if (!bias) {
      std::memcpy(out, residual, p.n * sizeof(T));
      continue;
    }
    int64_t j = 0;
    for (; j + Vec::kWidth <= p.n; j += Vec::kWidth)
      (Vec::load(residual + j) + Vec::load(bias + j)).store(out + j);
    for (; j < p.n; ++j) out[j] = from_float<T>(to_float(residual[j]) + to_float(bias[j]));
  }
}

// out (rows, n) = silu(gate_up[:, :n]) · gate_up[:, n:]
template <class T>
void silu_mul_rows(const SiluMul& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* gate = static_cast<const T*>(p.gate_up) + i * 2 * p.n;
    const T* up = gate + p.n;
    T* out = static_cast<T*>(p.out) + i * p.n;
    int64_t j = 0;
    for (; j + Vec::kWidth <= p.n; j += Vec::kWidth) {
      float g[Vec::kWidth];
      Vec::load(gate + j).store(g);
      for (int u = 0; u < Vec::kWidth; ++u) g[u] = silu(g[u]);
      (Vec::load(g) * Vec::load(up + j)).store(out + j);
    }
    for (; j < p.n; ++j) out[j] = from_float<T>(silu(to_float(gate[j])) * to_float(up[j]));
  }
}

}  // namespace NBL_ISA
}  // namespace nbl
