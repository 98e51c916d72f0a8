// The fused linear for many rows of x (prefill): out = epilogue(weight · prologue(x)), as in
// skinny_linear.h.
//
// clang-format off
//               kPanel outputs
//             ┌────────────┐    their rows of the weight, packed: the numbers (pairs, for bf16 where
//    columns  │   panel    │    the processor multiplies pairs) of one column after those of
//             │            │    another, a block of columns at a time; stays in L2 while all rows
//             └────────────┘    of x pass over it
//  kMicroRows ┌────────────┐    the accumulators fill the registers; the features are not packed:
//     rows of │ micro tile │    each number (pair) is broadcast from where it lies
//    features └────────────┘
// clang-format on
//
// So a weight is read from memory once, as it is stored: decode and prefill share one copy. The
// sums of a panel wait in L2 for the next block of columns, then for the epilogue, which writes
// rows of outputs: no pass over the products follows. Quantized rows become numbers before they are
// packed: those of int8 and fp8 exactly, their scales multiply the sums; those of int4 with the
// scales of their groups, rounded where features are bf16.
#pragma once

#include "gram.h"
#include "kernels.h"
#include "simd.h"
#include "skinny_linear.h"

namespace nbl {
namespace NBL_ISA {

#if defined(NBL_AVX512)
// In place: at[i] lane j <-> at[j] lane i, of 16 × 16 words.
inline void transpose_words(__m512i (&at)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(at[i], at[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(at[i], at[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // at[i + c]: column c of every four, of rows i to i + 3
    at[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    at[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    at[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    at[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {  // fours of rows: 0 with 4, 8 with 12
    t[c] = _mm512_shuffle_i32x4(at[c], at[c + 4], 0x88);
    t[c + 4] = _mm512_shuffle_i32x4(at[c], at[c + 4], 0xdd);
    t[c + 8] = _mm512_shuffle_i32x4(at[c + 8], at[c + 12], 0x88);
    t[c + 12] = _mm512_shuffle_i32x4(at[c + 8], at[c + 12], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    at[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
    at[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
    at[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
    at[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
  }
}
#endif

// panel[column][output] from `count` rows of k elements; zeros for the outputs that are missing.
template <class T>
void pack_panel(const T* rows, int64_t stride, int64_t count, int64_t k, float* panel) {
#if defined(NBL_AVX512)
  for (int64_t n = 0; n < kPanel; n += 16) {
    for (int64_t j = 0; j < k; j += 16) {
      __m512i words[16];
      for (int64_t r = 0; r < 16; ++r)
        words[r] = _mm512_castps_si512(
            (n + r < count ? load_some(rows + (n + r) * stride + j, k - j) : Vec::zero()).v);
      transpose_words(words);
      float* out = panel + j * kPanel + n;
      for (int64_t i = 0; i < std::min<int64_t>(16, k - j); ++i)
        _mm512_storeu_si512(out + i * kPanel, words[i]);
    }
  }
#else
  for (int64_t n = 0; n < kPanel; ++n)
    for (int64_t j = 0; j < k; ++j)
      panel[j * kPanel + n] = n < count ? to_float(rows[n * stride + j]) : 0.0f;
#endif
}

// sums (kMicroRows, kPanel) = (or +=) features · panel, over k columns. These are summed up before
// they are added: roundings grow with the root of k then, not with that of all columns.
inline void store_sums(const MicroTile& tile, bool add, float* sums) {
  for (int i = 0; i < kMicroRows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) {
      float* at = sums + i * kPanel + v * Vec::kWidth;
      (add ? Vec::load(at) + tile.at[i][v] : tile.at[i][v]).store(at);
    }
}

[[gnu::noinline]] inline void wide_tile(const float* features, int64_t padded, const float* panel,
                                        int64_t k, bool add, float* sums) {
  MicroTile tile;
  for (int i = 0; i < kMicroRows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) tile.at[i][v] = Vec::zero();
  for (int64_t j = 0; j < k; ++j) {
    Vec w[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) w[v] = Vec::load(panel + v * Vec::kWidth);
    for (int i = 0; i < kMicroRows; ++i) {
      const Vec f = Vec::broadcast(features[i * padded + j]);
      for (int v = 0; v < kPanelVecs; ++v) tile.at[i][v] = fma(f, w[v], tile.at[i][v]);
    }
    panel += kPanel;
  }
  store_sums(tile, add, sums);
}

#if defined(NBL_AVX512_BF16)
// The same in pairs of columns; zeros for the other half of the last one.
inline void pack_panel(const bfloat16* rows, int64_t stride, int64_t count, int64_t k,
                       bfloat16* panel) {
  for (int64_t n = 0; n < kPanel; n += 16) {
    for (int64_t j = 0; j < k; j += 32) {
      const int64_t left = std::min<int64_t>(32, k - j);
      const __mmask32 mask = (__mmask32)((uint64_t{1} << left) - 1);
      __m512i words[16];
      for (int64_t r = 0; r < 16; ++r)
        words[r] = n + r < count ? _mm512_maskz_loadu_epi16(mask, rows + (n + r) * stride + j)
                                 : _mm512_setzero_si512();
      transpose_words(words);
      bfloat16* out = panel + j * kPanel + 2 * n;
      for (int64_t i = 0; i < (left + 1) / 2; ++i)
        _mm512_storeu_si512(out + i * 2 * kPanel, words[i]);
    }
  }
}

[[gnu::noinline]] inline void wide_tile(const bfloat16* features, int64_t padded,
                                        const bfloat16* panel, int64_t k, bool add, float* sums) {
  MicroTile tile;
  for (int i = 0; i < kMicroRows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) tile.at[i][v] = Vec::zero();
  for (int64_t j = 0; j < k; j += 2) {
    __m512bh w[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) w[v] = (__m512bh)_mm512_loadu_si512(panel + 32 * v);
    for (int i = 0; i < kMicroRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, features + i * padded + j, sizeof pair);
      const __m512bh f = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kPanelVecs; ++v)
        tile.at[i][v].v = _mm512_dpbf16_ps(tile.at[i][v].v, f, w[v]);
    }
    panel += 2 * kPanel;
  }
  store_sums(tile, add, sums);
}
#endif

// out (end - begin, k) = rows [begin, end) of a quantized weight, without the scales of rows.
template <class W, class Feature>
void unpack_rows(const SkinnyLinear& p, int64_t begin, int64_t end, Feature* out) {
  for (int64_t n = begin; n < end; ++n, out += p.k) {
    if constexpr (kRowScale<W>) {
      const W* row = static_cast<const W*>(p.weight) + n * p.weight_stride;
      for (int64_t j = 0; j < p.k; j += Vec::kWidth)
        store_some(load_some(row + j, p.k - j), out + j, p.k - j);
    } else {
      using D = Dot<float, W>;
      const Int4Row row = int4_row(p.weight, p.weight_stride, p.weight_scale, p.k, n);
      for (int64_t k = 0; k < p.k; k += D::kStep) {
        const auto w = D::load_weights(row, k);
        for (int i = 0; i < D::kVecs; ++i) {
          const int64_t first = k + i * Vec::kWidth;
          if (first < p.k) store_some(w.v[i], out + first, p.k - first);
        }
      }
    }
  }
}

// A thread's memory for wide linears, in the order in which it lies there.
template <class T, class W>
struct WideScratch {
  using Feature = typename FeatureOf<T>::Type;
  static constexpr bool kQuantized = !std::is_same_v<T, W>;
  static constexpr int64_t kBlockBytes = 4096;
  static constexpr int64_t kBlockK = kBlockBytes / int64_t{sizeof(Feature)};  // packed at a time
  // Summed up before they are added. Fewer take 4 % longer (bfloat16), and where the result is
  // rounded to 16 bits nobody would see that they are more exact.
  static constexpr int64_t kSummedK = std::is_same_v<T, float> ? 256 : kBlockK;
  Feature* panel;  // (kBlockK, kPanel)
  float* sums[2];  // (m rounded up, kPanel); of gates and of ups
  Feature* rows;   // (kPanel, k), where quantized

  static int64_t rounded(int64_t m) { return (m + kMicroRows - 1) / kMicroRows * kMicroRows; }
  static int64_t bytes(int64_t m, int64_t k) {
    return kPanel * (kBlockBytes + 2 * rounded(m) * int64_t{sizeof(float)} +
                     (kQuantized ? k * int64_t{sizeof(Feature)} : 0));
  }
  WideScratch(void* memory, int64_t m) {
    panel = static_cast<Feature*>(memory);
    sums[0] = reinterpret_cast<float*>(panel + kBlockK * kPanel);
    sums[1] = sums[0] + rounded(m) * kPanel;
    rows = reinterpret_cast<Feature*>(sums[1] + rounded(m) * kPanel);
  }
};

template <class T, class W>
int64_t wide_scratch_bytes(int64_t m, int64_t k) {
  return WideScratch<T, W>::bytes(m, k);
}

// sums = features · `count` rows from there. What is packed next, the following columns or else the
// following rows, is brought into L2 meanwhile.
template <class R, class Feature>
void add_blocks(const R* rows, int64_t stride, int64_t count, const Feature* features,
                int64_t padded, int64_t groups, int64_t k, int64_t block_k, int64_t summed_k,
                Feature* panel, float* sums) {
  if (k == 0) std::fill_n(sums, groups * kMicroSize, 0.0f);
  for (int64_t block = 0; block < k; block += block_k) {
    const int64_t width = std::min(block_k, k - block);
    pack_panel(rows + block, stride, count, width, panel);
    const R* next = block + width < k ? rows + block + width : rows + count * stride;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t r = group * count / groups; r < (group + 1) * count / groups; ++r)
        for (int64_t j = 0; j < width; j += 64 / int64_t{sizeof(R)})
          __builtin_prefetch(next + r * stride + j, 0, 2);
      for (int64_t j = 0; j < width; j += summed_k)
        wide_tile(features + group * kMicroRows * padded + block + j, padded, panel + j * kPanel,
                  std::min(summed_k, width - j), block + j > 0, sums + group * kMicroSize);
    }
  }
}

// sums = features · rows [n, n + count) of the weight.
template <class T, class W>
void panel_sums(const SkinnyLinear& p, const typename FeatureOf<T>::Type* features, int64_t n,
                int64_t count, const WideScratch<T, W>& scratch, float* sums) {
  using Scratch = WideScratch<T, W>;
  const int64_t padded = padded_k<DotOf<T, T>>(p.k);
  const int64_t groups = Scratch::rounded(p.m) / kMicroRows;
  const auto add = [&](const auto* rows, int64_t stride) {
    add_blocks(rows, stride, count, features, padded, groups, p.k, Scratch::kBlockK,
               Scratch::kSummedK, scratch.panel, sums);
  };
  if constexpr (Scratch::kQuantized) {
    unpack_rows<W>(p, n, n + count, scratch.rows);
    add(scratch.rows, p.k);
  } else {
    add(static_cast<const T*>(p.weight) + n * p.weight_stride, p.weight_stride);
  }
  if constexpr (kRowScale<W>) {
    const float* scale = static_cast<const float*>(p.weight_scale) + n;
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t j = 0; j < count; ++j) sums[i * kPanel + j] *= scale[j];
  }
}

// Outputs [begin, end) of every row. `prepared` is what prepare_features<T, T> wrote, and memory up
// to a whole micro tile of rows.
template <class T, class W>
void wide_linear_columns(const SkinnyLinear& p, const void* prepared, void* memory, int64_t begin,
                         int64_t end) {
  const auto* features = static_cast<const typename FeatureOf<T>::Type*>(prepared);
  const T* bias = static_cast<const T*>(p.bias);
  const WideScratch<T, W> scratch(memory, p.m);
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, end - n);
    panel_sums(p, features, n, count, scratch, scratch.sums[0]);
    for (int64_t i = 0; i < p.m; ++i) {
      const float* sums = scratch.sums[0] + i * kPanel;
      T* out = static_cast<T*>(p.out) + i * p.out_stride + n;
      const T* residual =
          p.residual ? static_cast<const T*>(p.residual) + i * p.residual_stride + n : nullptr;
      for (int64_t j = 0; j < count; j += Vec::kWidth) {
        Vec sum = Vec::load(sums + j);
        if (bias) sum = sum + load_some(bias + n + j, count - j);
        if (residual) sum = sum + load_some(residual + j, count - j);
        store_some(sum, out + j, count - j);
      }
    }
  }
}

// The same for weight = (2n, k), n gate rows and then n up rows: out = silu(gate) · up.
template <class T, class W>
void wide_swiglu_columns(const SkinnyLinear& p, const void* prepared, void* memory, int64_t begin,
                         int64_t end) {
  const auto* features = static_cast<const typename FeatureOf<T>::Type*>(prepared);
  const WideScratch<T, W> scratch(memory, p.m);
  for (int64_t n = begin; n < end; n += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, end - n);
    panel_sums(p, features, n, count, scratch, scratch.sums[0]);
    panel_sums(p, features, p.n + n, count, scratch, scratch.sums[1]);
    for (int64_t i = 0; i < p.m; ++i) {
      float* gates = scratch.sums[0] + i * kPanel;
      const float* ups = scratch.sums[1] + i * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) gates[j] = silu(gates[j]) * ups[j];
      T* out = static_cast<T*>(p.out) + i * p.out_stride + n;
      for (int64_t j = 0; j < count; j += Vec::kWidth)
        store_some(Vec::load(gates + j), out + j, count - j);
    }
  }
}

}  // namespace NBL_ISA
}  // namespace nbl
