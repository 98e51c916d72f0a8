// The fused skinny linear: out = epilogue(weight · prologue(x)) for few rows of x (decode).
//
//   features (m, k)   x, or RMSNorm(x)·γ rounded to the type of x; written once by prepare_features
//   sums     (m, n)   features · weightᵀ, float32 products and sums
//   out      (m, n)   sums + bias + residual, or silu(gate sums) · up sums
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

// How a weight of type T meets the features: as floats, or bf16 pairs where the processor has them.
template <class T>
struct Dot {
  using Feature = float;
  using Weights = Vec;
  using Features = Vec;
  static constexpr int kStep = Vec::kWidth;
  static Weights load_weights(const T* p) { return Vec::load(p); }
  static Weights load_weights_partial(const T* p, int64_t n) { return load_partial(p, n); }
  static Features load_features(const float* p) { return Vec::load(p); }
  static Vec multiply_add(Weights w, Features f, Vec acc) { return fma(w, f, acc); }
};

#if defined(NBL_AVX512_BF16)
template <>
struct Dot<bfloat16> {
  using Feature = bfloat16;
  using Weights = __m512bh;
  using Features = __m512bh;
  static constexpr int kStep = 32;
  static Weights load_weights(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Weights load_weights_partial(const bfloat16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
  }
  static Features load_features(const bfloat16* p) { return load_weights(p); }
  static Vec multiply_add(Weights w, Features f, Vec acc) {
    return {_mm512_dpbf16_ps(acc.v, w, f)};
  }
};
#endif

// Rows of features take an odd number of cache lines: with a power of two, the same column of all
// rows would compete for the same few places of the first-level cache.
template <class T>
int64_t padded_k(int64_t k) {
  constexpr int64_t kLine = 64 / sizeof(typename Dot<T>::Feature);
  return ((k + 31) / 32 * 32 / kLine | 1) * kLine;
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

template <class T>
void prepare_features(const SkinnyLinear& p, void* features) {
  using Feature = typename Dot<T>::Feature;
  const int64_t padded = padded_k<T>(p.k);
  for (int64_t i = 0; i < p.m; ++i) {
    prepare_row(static_cast<const T*>(p.x) + i * p.x_stride, p.k, padded,
                static_cast<const T*>(p.norm_weight), p.norm_eps,
                static_cast<Feature*>(features) + i * padded);
  }
}

// sums[i][r] = Σ_k features[i][k] · rows[r][k] for kM rows of features and a tile of the weight.
// `next` holds the start of the following tile, in kGroups pieces of equally many adjacent rows.
template <class T, int kM, int kGroups>
[[gnu::noinline]] inline void dot_tile(const T* const rows[kTileRows],
                                       const typename Dot<T>::Feature* features, int64_t padded,
                                       int64_t k, const char* const next[kGroups], float* sums,
                                       int64_t sums_stride) {
  using D = Dot<T>;
  constexpr int kLines = kTileRows / kGroups;  // cache lines to prefetch per piece and step
  Vec acc[kM][kTileRows];
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileRows; ++r) acc[i][r] = Vec::zero();

  const int64_t whole = k - k % D::kStep;
  int64_t position = 0;
  for (int64_t j = 0; j < whole; j += D::kStep) {
    typename D::Weights w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = D::load_weights(rows[r] + j);
    if (next) {
      for (int g = 0; g < kGroups; ++g)
        for (int line = 0; line < kLines; ++line)
          __builtin_prefetch(next[g] + position + line * (D::kStep * int64_t{sizeof(T)}), 0, 2);
      position += kLines * D::kStep * int64_t{sizeof(T)};
    }
    for (int i = 0; i < kM; ++i) {
      const auto f = D::load_features(features + i * padded + j);
      for (int r = 0; r < kTileRows; ++r) acc[i][r] = D::multiply_add(w[r], f, acc[i][r]);
    }
  }
  if (whole < k) {
    typename D::Weights w[kTileRows];
    for (int r = 0; r < kTileRows; ++r) w[r] = D::load_weights_partial(rows[r] + whole, k - whole);
    for (int i = 0; i < kM; ++i) {
      const auto f = D::load_features(features + i * padded + whole);
      for (int r = 0; r < kTileRows; ++r) acc[i][r] = D::multiply_add(w[r], f, acc[i][r]);
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int r = 0; r < kTileRows; ++r) sums[i * sums_stride + r] = acc[i][r].sum();
}

template <class T, int kGroups>
inline void dot_tile_any_m(int m, const T* const rows[kTileRows],
                           const typename Dot<T>::Feature* features, int64_t padded, int64_t k,
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
        dot_tile<T, 1, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#if defined(NBL_AVX2) || defined(NBL_AVX512)
      case 2:
        dot_tile<T, 2, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#endif
#if defined(NBL_AVX512)
      case 3:
        dot_tile<T, 3, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 4:
        dot_tile<T, 4, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 5:
        dot_tile<T, 5, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
      case 6:
        dot_tile<T, 6, kGroups>(rows, f, padded, k, prefetch, s, sums_stride);
        break;
#endif
      default:
        break;
    }
    i += count;
  }
}

// Outputs [begin, end) of every row. `features` is what prepare_features wrote.
template <class T>
void linear_columns(const SkinnyLinear& p, const void* prepared, int64_t begin, int64_t end) {
  const auto* features = static_cast<const typename Dot<T>::Feature*>(prepared);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t padded = padded_k<T>(p.k);
  float sums[kSkinnyRows][kBlockN + kTileRows];
  for (int64_t block = begin; block < end; block += kBlockN) {
    const int64_t count = std::min<int64_t>(kBlockN, end - block);
    for (int64_t n = 0; n < count; n += kTileRows) {
      const T* rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r)  // past the end: the last row again, its sum is not used
        rows[r] = weight + std::min(block + n + r, end - 1) * p.weight_stride;
      const char* next[1] = {(const char*)(weight + (block + n + kTileRows) * p.weight_stride)};
      dot_tile_any_m<T, 1>(static_cast<int>(p.m), rows, features, padded, p.k, next, &sums[0][n],
                           kBlockN + kTileRows);
    }
    for (int64_t i = 0; i < p.m; ++i) {
      T* out = static_cast<T*>(p.out) + i * p.out_stride + block;
      float* s = sums[i];
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
template <class T>
void swiglu_columns(const SkinnyLinear& p, const void* prepared, int64_t begin, int64_t end) {
  constexpr int kHalf = kTileRows / 2;
  constexpr int kStride = 2 * kBlockN + kTileRows;
  const auto* features = static_cast<const typename Dot<T>::Feature*>(prepared);
  const T* gate = static_cast<const T*>(p.weight);
  const T* up = gate + p.n * p.weight_stride;
  const int64_t padded = padded_k<T>(p.k);
  float sums[kSkinnyRows][kStride];  // gate, gate, up, up, gate, gate, …
  for (int64_t block = begin; block < end; block += kBlockN) {
    const int64_t count = std::min<int64_t>(kBlockN, end - block);
    for (int64_t n = 0; n < count; n += kHalf) {
      const int64_t first = block + n, second = std::min(block + n + 1, end - 1);
      const T* rows[kTileRows] = {gate + first * p.weight_stride, gate + second * p.weight_stride,
                                  up + first * p.weight_stride, up + second * p.weight_stride};
      const char* next[2] = {(const char*)(gate + (first + kHalf) * p.weight_stride),
                             (const char*)(up + (first + kHalf) * p.weight_stride)};
      dot_tile_any_m<T, 2>(static_cast<int>(p.m), rows, features, padded, p.k, next,
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
