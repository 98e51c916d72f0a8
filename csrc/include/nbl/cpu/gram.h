// Streaming Gram matrices: out (float64) += Σ_tokens (x_i)(x_j) for pairs of inputs.
//
//             columns of the joint matrix [features | targets | block], in panels
//   tokens  ┌────┬────┬────┐
//   block 0 │    │    │    │  each (block, panel) is packed contiguously; products of two panels
//           ├────┼────┼────┤  over one block are summed in float32 registers,
//   block 1 │    │    │    │  and added to float64 sums once per block.
//           └────┴────┴────┘
//
// The sums of a tile stay in the cache while all blocks of a chunk pass over it. Tiles below the
// diagonal of a symmetric matrix are skipped. float32 sums see one block of tokens only, so their
// rounding errors (about 1e-7 of Σ|x_i x_j|) are independent and average out.
//
// Columns whose mean is far from zero are shifted first (x - s, s near the mean): otherwise those
// errors, relative to the mean square, would drown the variance. In float32 arithmetic and for bf16
// values within a factor of two of s the difference is exact (Sterbenz); tokens where it is not a
// bf16 number are left out, reported in `inexact`, and come again in a chunk of floats. The
// shift is undone on the float64 sums:
//   Σ x xᵀ = Σ v vᵀ + S sᵀ + s (S + n s)ᵀ,   v = x - s,  S = Σ v.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nbl {
namespace NBL_ISA {

#if defined(NBL_AVX512)
constexpr int kPanelVecs = 3, kMicroRows = 8;  // 24 accumulators of 32 registers
#elif defined(NBL_AVX2)
constexpr int kPanelVecs = 3, kMicroRows = 4;  // 12 of 16
#else
constexpr int kPanelVecs = 2, kMicroRows = 4;
#endif
constexpr int kPanel = kPanelVecs * Vec::kWidth;
constexpr int64_t kTileRowPanels = 192 / kPanel > 0 ? 192 / kPanel : 1;
constexpr int64_t kTileColPanels = 2 * kTileRowPanels;
constexpr int64_t kBlockTokens = 64;
constexpr int64_t kBlockTokensPairs = 192;
static_assert(kPanel % kMicroRows == 0, "a micro tile lies within one panel");

// One micro tile of a Gram matrix, in registers.
struct MicroTile {
  Vec at[kMicroRows][kPanelVecs];
};

// at[i][j] = Σ_t rows[t][i] · cols[t][j] over one packed block of floats.
[[gnu::noinline]] inline MicroTile multiply_block(const float* rows, const float* cols) {
  MicroTile tile;
  for (int i = 0; i < kMicroRows; ++i)
    for (int j = 0; j < kPanelVecs; ++j) tile.at[i][j] = Vec::zero();
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    Vec c[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) c[j] = Vec::load(cols + j * Vec::kWidth);
    for (int i = 0; i < kMicroRows; ++i) {
      const Vec r = Vec::broadcast(rows[i]);
      for (int j = 0; j < kPanelVecs; ++j) tile.at[i][j] = fma(r, c[j], tile.at[i][j]);
    }
    rows += kPanel;
    cols += kPanel;
  }
  return tile;
}

#if defined(NBL_AVX512_BF16)
// The same over pairs of tokens: one instruction multiplies and adds both.
[[gnu::noinline]] inline MicroTile multiply_block(const bfloat16* rows, const bfloat16* cols) {
  MicroTile tile;
  for (int i = 0; i < kMicroRows; ++i)
    for (int j = 0; j < kPanelVecs; ++j) tile.at[i][j] = Vec::zero();
  for (int64_t t = 0; t < kBlockTokensPairs; t += 2) {
    __m512bh c[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) c[j] = (__m512bh)_mm512_loadu_si512(cols + 32 * j);
    for (int i = 0; i < kMicroRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, rows + 2 * i, sizeof pair);
      const __m512bh r = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < kPanelVecs; ++j)
        tile.at[i][j].v = _mm512_dpbf16_ps(tile.at[i][j].v, r, c[j]);
    }
    rows += 2 * kPanel;
    cols += 2 * kPanel;
  }
  return tile;
}
#endif

// Sums of one tile over the blocks of a chunk: micro tile after micro tile, each contiguous. (Rows
// of a matrix whose width is a power of two would compete for the same places in the cache.)
constexpr int64_t kMicroSize = int64_t{kMicroRows} * kPanel;

inline double* micro_sums(double* tile_sums, int64_t row, int64_t col) {
  constexpr int64_t kMicrosPerPanel = kTileRowPanels * kPanel / kMicroRows;
  return tile_sums + (col / kPanel * kMicrosPerPanel + row / kMicroRows) * kMicroSize;
}

template <class Packed>
void multiply_tile(const GramChunk& chunk, const GramJob& job, int64_t row_begin, int64_t row_end,
                   int64_t col_begin, int64_t col_end, double* tile_sums) {
  const Packed* packed = static_cast<const Packed*>(chunk.packed);
  const int64_t panel_size = chunk.block_tokens * kPanel;
  constexpr int64_t kRowElements = std::is_same_v<Packed, float> ? 1 : 2;
  for (int64_t block = 0; block < chunk.num_blocks; ++block) {
    const Packed* panels = packed + block * chunk.num_panels * panel_size;
    for (int64_t col = col_begin; col < col_end; col += kPanel) {
      const Packed* cols = panels + (job.col_panel + col / kPanel) * panel_size;
      for (int64_t row = row_begin; row < row_end; row += kMicroRows) {
        if (job.upper && row >= col + kPanel) break;  // from here on below the diagonal
        const Packed* rows =
            panels + (job.row_panel + row / kPanel) * panel_size + row % kPanel * kRowElements;
        const MicroTile tile = multiply_block(rows, cols);
        double* sums = micro_sums(tile_sums, row - row_begin, col - col_begin);
        for (int i = 0; i < kMicroRows; ++i)
          for (int j = 0; j < kPanelVecs; ++j)
            tile.at[i][j].add_to(sums + i * kPanel + j * Vec::kWidth);
      }
    }
  }
}

// out += the tile's sums, and what the shifts took away: S_i s_j + s_i (S_j + n s_j).
inline void finish_tile(const GramChunk& chunk, const GramJob& job, int64_t row_begin,
                        int64_t row_end, int64_t col_begin, int64_t col_end, double* tile_sums) {
  for (int64_t col = col_begin; col < col_end; col += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, col_end - col);
    const float* col_shifts = chunk.shifts + job.col_panel * kPanel + col;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const double* sums = micro_sums(tile_sums, row - row_begin, col - col_begin) +
                           (row - row_begin) % kMicroRows * kPanel;
      double* out = job.out + row * job.stride + col;
      for (int64_t j = 0; j < width; ++j) out[j] += sums[j];
      if (!job.recenter || !chunk.shifted) continue;
      const double* col_sums = chunk.sums + job.col_panel * kPanel + col;
      const double shift = chunk.shifts[job.row_panel * kPanel + row];
      const double sum = chunk.sums[job.row_panel * kPanel + row] + chunk.count * shift;
      for (int64_t j = 0; j < width; ++j) out[j] += sum * col_shifts[j] + shift * col_sums[j];
    }
  }
}

// `tile_sums` is scratch memory of this thread for tile_row_panels × tile_col_panels panels².
inline void gram_tile(const GramChunk& chunk, const GramJob& job, int64_t tile, double* tile_sums) {
  const int64_t row_begin = tile / job.col_tiles * kTileRowPanels * kPanel;
  const int64_t col_begin = tile % job.col_tiles * kTileColPanels * kPanel;
  const int64_t row_end = std::min(row_begin + kTileRowPanels * kPanel, job.rows);
  const int64_t col_end = std::min(col_begin + kTileColPanels * kPanel, job.cols);
  if (job.upper && row_begin >= col_end) return;
  std::fill_n(tile_sums, kTileRowPanels * kPanel * kTileColPanels * kPanel, 0.0);
#if defined(NBL_AVX512_BF16)
  if (chunk.pairs)
    multiply_tile<bfloat16>(chunk, job, row_begin, row_end, col_begin, col_end, tile_sums);
  else
#endif
    multiply_tile<float>(chunk, job, row_begin, row_end, col_begin, col_end, tile_sums);
  finish_tile(chunk, job, row_begin, row_end, col_begin, col_end, tile_sums);
}

template <class T>
void column_stats(const GramInput& input, const int64_t* tokens, int64_t count, float* sums,
                  float* squares) {
  constexpr int64_t kGroup = 8;  // tokens added up in registers before they are stored
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, count);
    for (int64_t c = 0; c < input.dim; c += Vec::kWidth) {
      const int64_t width = std::min<int64_t>(Vec::kWidth, input.dim - c);
      Vec sum = Vec::zero(), square = Vec::zero();
      for (int64_t t = begin; t < end; ++t) {
        const T* p = static_cast<const T*>(input.data) + tokens[t] * input.stride + c;
        const Vec v = width == Vec::kWidth ? Vec::load(p) : load_partial(p, width);
        sum = sum + v;
        square = fma(v, v, square);
      }
      if (width == Vec::kWidth) {
        (Vec::load(sums + c) + sum).store(sums + c);
        (Vec::load(squares + c) + square).store(squares + c);
      } else {
        store_partial(load_partial(sums + c, width) + sum, sums + c, width);
        store_partial(load_partial(squares + c, width) + square, squares + c, width);
      }
    }
  }
}

template <class T>
void pack_floats(const GramChunk& chunk, int64_t block) {
  float* panels =
      static_cast<float*>(chunk.packed) + block * chunk.num_panels * kBlockTokens * kPanel;
  const int64_t first = block * kBlockTokens;
  const int64_t count = std::min(kBlockTokens, chunk.num_tokens - first);
  for (int s = 0; s < chunk.num_inputs; ++s) {
    const GramInput& input = chunk.inputs[s];
    for (int64_t c = 0; c < input.dim; c += Vec::kWidth) {
      const int64_t width = std::min<int64_t>(Vec::kWidth, input.dim - c);
      const int64_t panel = input.first_panel + c / kPanel;
      float* out = panels + panel * kBlockTokens * kPanel + c % kPanel;
      const Vec shift = Vec::load(chunk.shifts + input.first_panel * kPanel + c);
      for (int64_t t = 0; t < count; ++t) {
        const T* p = static_cast<const T*>(input.data) + chunk.tokens[first + t] * input.stride + c;
        const Vec v = width == Vec::kWidth ? Vec::load(p) : load_partial(p, width);
        (v - shift).store(out + t * kPanel);
      }
      for (int64_t t = count; t < kBlockTokens; ++t) Vec::zero().store(out + t * kPanel);
    }
  }
  float* ones = panels + (chunk.num_panels - 1) * kBlockTokens * kPanel;
  for (int64_t t = 0; t < kBlockTokens; ++t) ones[t * kPanel] = t < count ? 1.0f : 0.0f;
}

#if defined(NBL_AVX512_BF16)
// 16 values of one token as bits, low halves zero when they are bf16 numbers.
inline __m512i shifted_bits(const bfloat16* p, __mmask16 mask, const float* shift) {
  const __m512i wide =
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
  return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(wide), _mm512_loadu_ps(shift)));
}

inline bool shift_is_exact(const GramChunk& chunk, int64_t token) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int s = 0; s < chunk.num_inputs; ++s) {
    const GramInput& input = chunk.inputs[s];
    const bfloat16* row = static_cast<const bfloat16*>(input.data) + token * input.stride;
    const float* shift = chunk.shifts + input.first_panel * kPanel;
    __mmask16 inexact = 0;
    for (int64_t c = 0; c < input.dim; c += 16) {
      const __mmask16 mask =
          static_cast<__mmask16>((1u << std::min<int64_t>(16, input.dim - c)) - 1);
      inexact |= _mm512_mask_test_epi32_mask(mask, shifted_bits(row + c, mask, shift + c), low);
    }
    if (inexact) return false;
  }
  return true;
}

inline void pack_pairs(const GramChunk& chunk, int64_t block) {
  bfloat16* panels =
      static_cast<bfloat16*>(chunk.packed) + block * chunk.num_panels * kBlockTokensPairs * kPanel;
  const int64_t first = block * kBlockTokensPairs;
  const int64_t count = std::min(kBlockTokensPairs, chunk.num_tokens - first);
  bfloat16* ones = panels + (chunk.num_panels - 1) * kBlockTokensPairs * kPanel;
  bool counted[kBlockTokensPairs] = {};
  for (int64_t t = 0; t < kBlockTokensPairs; ++t) {
    if (t < count) {
      counted[t] = !chunk.shifted || shift_is_exact(chunk, chunk.tokens[first + t]);
      chunk.inexact[first + t] = !counted[t];
    }
    ones[t / 2 * 2 * kPanel + t % 2].bits = counted[t] ? 0x3f80 : 0;
  }
  for (int s = 0; s < chunk.num_inputs; ++s) {
    const GramInput& input = chunk.inputs[s];
    const float* shifts = chunk.shifts + input.first_panel * kPanel;
    for (int64_t c = 0; c < input.dim; c += 16) {
      const __mmask16 mask =
          static_cast<__mmask16>((1u << std::min<int64_t>(16, input.dim - c)) - 1);
      const int64_t panel = input.first_panel + c / kPanel;
      bfloat16* out = panels + panel * kBlockTokensPairs * kPanel + 2 * (c % kPanel);
      for (int64_t t = 0; t < kBlockTokensPairs; t += 2) {
        __m512i halves[2];
        for (int u = 0; u < 2; ++u) {
          if (!counted[t + u]) {
            halves[u] = _mm512_setzero_si512();
            continue;
          }
          const bfloat16* p = static_cast<const bfloat16*>(input.data) +
                              chunk.tokens[first + t + u] * input.stride + c;
          halves[u] =
              chunk.shifted
                  ? shifted_bits(p, mask, shifts + c)
                  : _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
        }
        const __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(halves[0], 16), halves[1]);
        _mm512_storeu_si512(out + t * kPanel, pairs);
      }
    }
  }
}
#endif

template <class T>
void pack(const GramChunk& chunk, int64_t block) {
#if defined(NBL_AVX512_BF16)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (chunk.pairs) return pack_pairs(chunk, block);
  }
#endif
  pack_floats<T>(chunk, block);
}

}  // namespace NBL_ISA
}  // namespace nbl
