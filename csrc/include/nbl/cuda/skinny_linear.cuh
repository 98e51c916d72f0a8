// The fused skinny linear: out = epilogue(weight · prologue(x)) for few rows of x (decode).
//
//   x       (m, k)   tokens; f = x, or RMSNorm(x)·γ
//   weight  (n, k)   or (2n, k) for swiglu: n gate rows, then n up rows
//   out     (m, n)   f · weightᵀ + bias + residual, or silu(gate) · up; float32 until then, one
//                    rounding at the end
//
// With few tokens the time is that of reading the weight once, so everything is arranged for that:
//
//             ┌───────────────────────── k ─────────────────────────┐
//   block     │ w0 │ w1 │ w2 │ … │ w7 │ w0 │ w1 │ …                 │  one tile of weight rows; its
//   (tile)    │    │    │    │   │    │    │    │                   │  8 warps take k in turns
//   next      ├────┴────┴────┴───┴────┴────┴────┴───────────────────┤
//   block     │                                                     │
//
// A warp's step is 16 bytes per lane of every row of the tile, from global memory to registers and
// straight into the products: no weight is used twice, so shared memory would only be a detour. A
// ring of kUnroll steps is in flight per warp; a step is loaded again as soon as it was multiplied.
// x comes along in the same way, from the L1 and L2 caches. In the end the warps' partial sums meet
// in shared memory and are added in the order of the warps. Where there are fewer tiles than the
// machine has room for, several blocks split k (blockIdx.y): each leaves its sums in a workspace,
// and the last one to arrive adds them in the order of the splits. So results do not depend on
// scheduling. More tokens than a block takes are other blocks, launched beside each other so that
// only one of them reads the weight from memory, the rest from L2.
//
// The products of a step:
//   mma   bfloat16, float16, several tokens. The weights are the wide operand of m16n8k16, 16 rows
//         to a fragment, tokens are its 8 columns. Lane 4g + t holds 8 consecutive k, from 8t on,
//         of weight rows g and g + 8 and of token g. The order of k within a product is free as
//         long as both operands agree on it, so words 0, 1 of these granules are the k-slots of one
//         mma, words 2, 3 those of a second: no element moves between lanes. For swiglu, row g is a
//         gate row and row g + 8 its up row.
//   fma   one token, and float32: each lane multiplies its granules in float32, a warp covers 512
//         consecutive bytes of each row of the tile.
//
// RMSNorm costs no pass of its own. γ is multiplied in as x is read, Σ x² is gathered beside the
// products, and 1/sqrt(mean + eps) scales the finished sums. In the fma products all of this is
// float32; in mma products x·γ is rounded to T, without the scale that PyTorch has multiplied in
// before it rounds: the relative error is that of one rounding, as there. In float16 x·γ could
// overflow without the scale, so there (kNormFirst) each block reads x once more, beforehand, for
// the scale.
//
// Tokens past m and rows past n are copies of the last one: computed, never written. What is past k
// counts as zero, in x and in the weight.
#pragma once

#include "nbl/cuda/linear_tiles.h"
#include "nbl/cuda/row_ops.cuh"

namespace nbl {

// Blocks that differ in their tokens only follow each other: blockIdx.x = tile · groups + group.
template <class Tile>
NBL_DEVICE int token_groups(const LinearParams& p) {
  return (p.m + Tile::kTokens - 1) / Tile::kTokens;
}

template <class Tile>
NBL_DEVICE int64_t first_token(const LinearParams& p) {
  return int64_t{static_cast<int>(blockIdx.x) % token_groups<Tile>(p)} * Tile::kTokens;
}

template <class Tile>
NBL_DEVICE int64_t first_output(const LinearParams& p) {
  return int64_t{static_cast<int>(blockIdx.x) / token_groups<Tile>(p)} * Tile::kOutputs;
}

// Row of the tile that holds the sum of an output: its only one, or its gate (half 0) or up (1).
template <class Tile>
NBL_DEVICE int tile_row(int output, int half) {
  if constexpr (!Tile::kSwiglu) return output;
  return (output / Tile::kHalf * 2 + half) * Tile::kHalf + output % Tile::kHalf;
}

// The weight row that is row `r` of the tile: the inverse of the above.
template <class Tile>
NBL_DEVICE const typename Tile::T* weight_row(const LinearParams& p, int r) {
  constexpr int kHalf = Tile::kHalf;
  const int output = Tile::kSwiglu ? r / (2 * kHalf) * kHalf + r % kHalf : r;
  const int half = Tile::kSwiglu ? r / kHalf % 2 : 0;
  const int64_t column = first_output<Tile>(p) + output;
  const int64_t row = (column < p.n ? column : p.n - 1) + int64_t{half} * p.n;
  return static_cast<const typename Tile::T*>(p.weight) + row * p.weight_stride;
}

template <class Tile>
NBL_DEVICE const typename Tile::T* token_row(const LinearParams& p, int token) {
  const int64_t row = first_token<Tile>(p) + token;
  return static_cast<const typename Tile::T*>(p.x) + (row < p.m ? row : p.m - 1) * p.x_stride;
}

template <class Tile>
NBL_DEVICE Bytes16 load_weights(const typename Tile::T* row, int k, int end) {
  if constexpr (Tile::kVector) {
    Bytes16 granule = {};
    if (k < end) granule = load_streaming(row + k);
    return granule;
  } else {
    return gather(row, k, end);
  }
}

// ---- The products of one warp ------------------------------------------------------------------

// For lane 4g + t: rows 16i + g and 16i + 8 + g of the tile, tokens 8j + g, k from 8t on.
template <class Tile>
struct MmaProducts {
  using T = typename Tile::T;
  static constexpr int kRowTiles = Tile::kRows / 16;
  static constexpr int kTokenTiles = Tile::kTokens / 8;
  static constexpr int kTokens = Tile::kTokens;

  struct Step {
    Bytes16 weights[kRowTiles][2], x[kTokenTiles], gamma;
  };

  const T* weight[kRowTiles][2];  // at the k of this lane's next step, as the other two
  const T* x[kTokenTiles];
  const T* norm_weight;
  float scale[kTokenTiles];  // where kNormFirst
  float sums[kRowTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles] = {};

  NBL_DEVICE MmaProducts(const LinearParams& p, int lane, int k) {
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      weight[i][0] = weight_row<Tile>(p, 16 * i + g) + k;
      weight[i][1] = weight_row<Tile>(p, 16 * i + 8 + g) + k;
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x[j] = token_row<Tile>(p, 8 * j + g) + k;
    norm_weight = static_cast<const T*>(p.norm_weight) + k;
  }

  NBL_DEVICE void advance(int k) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      weight[i][0] += k;
      weight[i][1] += k;
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x[j] += k;
    norm_weight += k;
  }

  NBL_DEVICE static int first_k(int lane) { return lane % 4 * 8; }

  NBL_DEVICE void prefetch(int k) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      prefetch_l2(weight[i][0] + k);
      prefetch_l2(weight[i][1] + k);
    }
  }

  NBL_DEVICE void set_scale(const float* token_scale, int lane) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) scale[j] = token_scale[8 * j + lane / 4];
  }

  NBL_DEVICE void load(Step& step, int k, int left) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      step.weights[i][0] = load_weights<Tile>(weight[i][0], k, left);
      step.weights[i][1] = load_weights<Tile>(weight[i][1], k, left);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      step.x[j] = load_granule<T, Tile::kVector>(x[j], k, left);
    }
    if constexpr (Tile::kNorm) step.gamma = load_granule<T, Tile::kVector>(norm_weight, k, left);
  }

  // x · γ, rounded; gathers Σ x² on the way.
  NBL_DEVICE Bytes16 normalize(const Bytes16& granule, const float (&gamma)[8], int j) {
    float v[8];
    unpack<T>(granule, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if constexpr (Tile::kNormFirst) {
        v[e] *= scale[j];
      } else {
        squares[j] += v[e] * v[e];
      }
      v[e] *= gamma[e];
    }
    return pack<T>(v);
  }

  NBL_DEVICE void multiply(const Step& step) {
    uint32_t b[kTokenTiles][2][2];
    float gamma[8];
    if constexpr (Tile::kNorm) unpack<T>(step.gamma, gamma);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      Bytes16 f = step.x[j];
      if constexpr (Tile::kNorm) f = normalize(f, gamma, j);
#pragma unroll
      for (int word = 0; word < 4; ++word) b[j][word / 2][word % 2] = f.word[word];
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const Bytes16 &low = step.weights[i][0], &high = step.weights[i][1];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t a[4] = {low.word[2 * part], high.word[2 * part], low.word[2 * part + 1],
                               high.word[2 * part + 1]};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) mma_m16n8k16<T>(sums[i][j], a, b[j][part]);
      }
    }
  }

  NBL_DEVICE void write(float* record, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        float* low = record + (16 * i + g) * kTokens + 8 * j + 2 * t;
        float* high = low + 8 * kTokens;
        low[0] = sums[i][j][0];
        low[1] = sums[i][j][1];
        high[0] = sums[i][j][2];
        high[1] = sums[i][j][3];
      }
    }
    if constexpr (Tile::kNorm && !Tile::kNormFirst) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        float square = squares[j] + shuffle_xor(squares[j], 1);
        square += shuffle_xor(square, 2);
        if (t == 0) record[Tile::kRows * kTokens + 8 * j + g] = square;
      }
    }
  }
};

// Every row and token of the tile, k from kGranule · lane on.
template <class Tile>
struct FmaProducts {
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kRows;
  static constexpr int kTokens = Tile::kTokens;

  struct Step {
    Bytes16 weights[kRows], x[kTokens], gamma;
  };

  const T* weight[kRows];  // at the k of this lane's next step, as the other two
  const T* x[kTokens];
  const T* norm_weight;
  float sums[kRows][kTokens] = {};
  float squares[kTokens] = {};

  NBL_DEVICE FmaProducts(const LinearParams& p, int, int k) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) weight[r] = weight_row<Tile>(p, r) + k;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] = token_row<Tile>(p, j) + k;
    norm_weight = static_cast<const T*>(p.norm_weight) + k;
  }

  NBL_DEVICE void advance(int k) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) weight[r] += k;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] += k;
    norm_weight += k;
  }

  NBL_DEVICE static int first_k(int lane) { return lane * kGranule<T>; }

  NBL_DEVICE void prefetch(int k) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) prefetch_l2(weight[r] + k);
  }

  NBL_DEVICE void load(Step& step, int k, int left) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) step.weights[r] = load_weights<Tile>(weight[r], k, left);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) step.x[j] = load_granule<T, Tile::kVector>(x[j], k, left);
    if constexpr (Tile::kNorm) step.gamma = load_granule<T, Tile::kVector>(norm_weight, k, left);
  }

  NBL_DEVICE void multiply(const Step& step) {
    constexpr int kElements = kGranule<T>;
    float f[kTokens][kElements];
    float gamma[kElements];
    if constexpr (Tile::kNorm) unpack<T>(step.gamma, gamma);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      unpack<T>(step.x[j], f[j]);
      if constexpr (Tile::kNorm) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          squares[j] += f[j][e] * f[j][e];
          f[j][e] *= gamma[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float w[kElements];
      unpack<T>(step.weights[r], w);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) sums[r][j] += w[e] * f[j][e];
      }
    }
  }

  NBL_DEVICE void write(float* record, int lane) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float sum = sum_over_warp(sums[r][j]);
        if (lane == 0) record[r * kTokens + j] = sum;
      }
    }
    if constexpr (Tile::kNorm) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float square = sum_over_warp(squares[j]);
        if (lane == 0) record[kRows * kTokens + j] = square;
      }
    }
  }
};

template <class Tile, bool kMma>
struct ProductsOf {
  using Type = MmaProducts<Tile>;
};
template <class Tile>
struct ProductsOf<Tile, false> {
  using Type = FmaProducts<Tile>;
};

// ---- Across warps and blocks -------------------------------------------------------------------

// Adds up the records of the splits of a tile. True in the last block of the tile to arrive, which
// then holds the whole sums in `record`; the others are done.
template <class Tile>
NBL_DEVICE bool combine_splits(const LinearParams& p, float* record, uint32_t* arrived) {
  constexpr int kRecord = Tile::kRecord;
  const int splits = gridDim.y;
  float* partials = p.partials + int64_t{blockIdx.x} * splits * kRecord;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRecord; i += kLinearThreads) {
    partials[int64_t{blockIdx.y} * kRecord + i] = record[i];
  }
  fence_global();
  sync_block();
  if (threadIdx.x == 0) {
    *arrived = atomic_add(&p.counters[blockIdx.x], 1);
    fence_global();
  }
  sync_block();
  if (*arrived + 1 != static_cast<uint32_t>(splits)) return false;
  fence_global();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRecord; i += kLinearThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) sum += partials[int64_t{split} * kRecord + i];
    record[i] = sum;
  }
  if (threadIdx.x == 0) p.counters[blockIdx.x] = 0;  // for the next launch
  return true;
}

template <class Tile>
NBL_DEVICE void write_outputs(const LinearParams& p, const float* record) {
  using T = typename Tile::T;
  constexpr int kOutputs = Tile::kOutputs, kTokens = Tile::kTokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutputs * kTokens; i += kLinearThreads) {
    const int output = i % kOutputs, token = i / kOutputs;
    const int64_t n = first_output<Tile>(p) + output;
    const int64_t m = first_token<Tile>(p) + token;
    if (n >= p.n || m >= p.m) continue;
    float scale = 1.0f;
    if constexpr (Tile::kNorm && !Tile::kNormFirst) {
      scale = norm_scale(record[Tile::kRows * kTokens + token], p.k, p.norm_eps);
    }
    float value = record[tile_row<Tile>(output, 0) * kTokens + token] * scale;
    if constexpr (Tile::kSwiglu) {
      value = silu(value) * (record[tile_row<Tile>(output, 1) * kTokens + token] * scale);
    } else {
      if (p.bias) value += to_float(static_cast<const T*>(p.bias)[n]);
      if (p.residual) {
        value += to_float(static_cast<const T*>(p.residual)[m * p.residual_stride + n]);
      }
    }
    static_cast<T*>(p.out)[m * p.out_stride + n] = from_float<T>(value);
  }
}

// Grid: (tiles of n · groups of kTokens tokens, splits of k), kLinearThreads threads.
template <class Tile>
__global__ void __launch_bounds__(kLinearThreads, Tile::kBlocksPerSm)
    skinny_linear(NBL_PARAM LinearParams p) {
  using Products = typename ProductsOf<Tile, Tile::kMma>::Type;
  constexpr int kUnroll = Tile::kUnroll;
  constexpr int kRound = kLinearWarps * Tile::kStep;  // k of one step of all warps
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float* warp_records = reinterpret_cast<float*>(shared_memory());
  float* record = warp_records + kLinearWarps * Tile::kRecord;
  float* token_scale = record + Tile::kRecord;
  uint32_t* arrived =
      reinterpret_cast<uint32_t*>(token_scale + (Tile::kNormFirst ? Tile::kTokens : 0));

  const int64_t begin = int64_t{blockIdx.y} * p.split_k;
  const int end = static_cast<int>(begin + p.split_k < p.k ? begin + p.split_k : p.k);
  const int offset = warp * Tile::kStep + Products::first_k(lane);
  int left = end - static_cast<int>(begin) - offset;  // from here to the end
  Products products(p, lane, static_cast<int>(begin) + offset);
  // What is not known to be finished may be brought into L2 already; two lanes have the 32 bytes
  // that memory moves at once.
  if ((p.dependent || Tile::kNormFirst) && lane % 2 == 0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * kRound < left) products.prefetch(u * kRound);
    }
  }
  grid_dependency_wait();
  grid_dependency_launch();

  if constexpr (Tile::kNormFirst) {
    for (int token = warp; token < Tile::kTokens; token += kLinearWarps) {
      const float sum = sum_over_warp(sum_of_squares<typename Tile::T, Tile::kVector>(
          token_row<Tile>(p, token), p.k, lane, 32));
      if (lane == 0) token_scale[token] = norm_scale(sum, p.k, p.norm_eps);
    }
    sync_block();
    products.set_scale(token_scale, lane);
  }

  typename Products::Step steps[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) products.load(steps[u], u * kRound, left);
#pragma unroll 1  // further unrolling brings no more steps into flight, but takes registers
  for (int64_t round = begin; round < end; round += kUnroll * kRound) {
    products.advance(kUnroll * kRound);
    left -= kUnroll * kRound;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      products.multiply(steps[u]);
      products.load(steps[u], u * kRound, left);
    }
  }

  products.write(warp_records + warp * Tile::kRecord, lane);
  sync_block();
#pragma unroll 1
  for (int i = thread; i < Tile::kRecord; i += kLinearThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kLinearWarps; ++w) sum += warp_records[w * Tile::kRecord + i];
    record[i] = sum;
  }
  if (gridDim.y > 1 && !combine_splits<Tile>(p, record, arrived)) return;
  sync_block();
  write_outputs<Tile>(p, record);
}

}  // namespace nbl
