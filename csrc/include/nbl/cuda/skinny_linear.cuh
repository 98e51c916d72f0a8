// The fused skinny linear: out = epilogue(weight · prologue(x)) for few rows of x (decode).
//
//   x       (m, k)   tokens; f = x, or RMSNorm(x)·γ
//   weight  (n, k)   or (2n, k) for swiglu: n gate rows, then n up rows; in the type of x, or
//                    quantized (nbl/dtypes.h): int8, fp8 with a scale per row, int4 per group
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
// A granule of a quantized weight becomes, in registers, two (8 bits) or four (int4) granules of 8
// numbers each, exactly, that are multiplied as above: consecutive ones, or 32 columns apart within
// a group of int4, whose 64 bytes lie with four neighbouring lanes. Scales of rows multiply the
// finished sums; of int4, the products of a group are summed on their own, then scaled.
//
// RMSNorm costs no pass of its own. γ is multiplied in as x is read, Σ x² is gathered beside the
// products (mma: as the diagonal of x · xᵀ), and 1/sqrt(mean + eps) scales the finished sums. In
// the fma products all of this is float32; in mma products x·γ is rounded to T, without the scale
// that PyTorch has multiplied in before it rounds: the relative error is that of one rounding, as
// there. In float16 x·γ could overflow without the scale, so there (kNormFirst) each block reads x
// once more, beforehand, for the scale.
//
// Tokens past m and rows past n are copies of the last one: computed, never written. What is past k
// counts as zero, in x and in the weight.
#pragma once

#include "nbl/cuda/linear_tiles.h"
#include "nbl/cuda/row_ops.cuh"
#include "nbl/cuda/weight_formats.cuh"

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

// Which output of its tile row `r` belongs to: every row is one, or a gate (half 0) or up row (1).
template <class Tile>
NBL_DEVICE int row_output(const LinearParams& p, int r) {
  constexpr int kHalf = Tile::kHalf;
  return p.swiglu ? r / (2 * kHalf) * kHalf + r % kHalf : r;
}

template <class Tile>
NBL_DEVICE int row_half(const LinearParams& p, int r) {
  return p.swiglu ? r / Tile::kHalf % 2 : 0;
}

template <class Tile>
NBL_DEVICE int64_t first_output(const LinearParams& p) {
  const int outputs = p.swiglu ? Tile::kRows / 2 : Tile::kRows;
  return int64_t{static_cast<int>(blockIdx.x) / token_groups<Tile>(p)} * outputs;
}

// The row of the weight that is row `r` of the tile.
template <class Tile>
NBL_DEVICE int64_t weight_row(const LinearParams& p, int r) {
  const int64_t column = first_output<Tile>(p) + row_output<Tile>(p, r);
  return (column < p.n ? column : p.n - 1) + int64_t{row_half<Tile>(p, r)} * p.n;
}

// Where weight k of such a row is, for k from where a step begins; int4 lies there in bytes.
template <class Tile>
struct WeightPointer {
  using Element = typename StoredAs<typename Tile::W>::Element;
  const Element* address;

  NBL_DEVICE WeightPointer() {}
  NBL_DEVICE WeightPointer(const LinearParams& p, int64_t row, int k, int granule)
      : address(static_cast<const Element*>(p.weight) + row * p.weight_stride + elements(k) +
                granule * (16 / int{sizeof(Element)})) {}

  NBL_DEVICE static int elements(int k) { return Tile::kGroups ? k / 2 : k; }
  NBL_DEVICE void advance(int k) { address += elements(k); }
  NBL_DEVICE void prefetch(int k) const { prefetch_l2(address + elements(k)); }

  // The granule k further on; zeros from `end` on, which no group of int4 crosses.
  NBL_DEVICE Bytes16 load(int k, int end) const {
    if constexpr (Tile::kVector) {
      Bytes16 granule = {};
      if (k < end) granule = load_streaming(address + elements(k));
      return granule;
    } else if constexpr (Tile::kGroups) {
      return gather(address + elements(k), 0, k < end ? 16 : 0);
    } else {
      return gather(address, k, end);
    }
  }
};

template <class Tile>
NBL_DEVICE const typename Tile::T* token_row(const LinearParams& p, int token) {
  const int64_t row = first_token<Tile>(p) + token;
  return static_cast<const typename Tile::T*>(p.x) + (row < p.m ? row : p.m - 1) * p.x_stride;
}

// The scale of a group of int4, as it was loaded; nothing where the tile has none.
template <class Tile, bool kGroups = Tile::kGroups>
struct GroupScale {};
template <class Tile>
struct GroupScale<Tile, true> {
  bfloat16 bits;
  NBL_DEVICE float value() const { return to_float(bits); }
};

// Where the scale of a row's group is that holds k.
template <class Tile, bool kGroups = Tile::kGroups>
struct GroupScalePointer {
  NBL_DEVICE GroupScalePointer() {}
  NBL_DEVICE GroupScalePointer(const LinearParams&, int64_t, int) {}
  NBL_DEVICE void advance(int) {}
  NBL_DEVICE GroupScale<Tile> load(int, int) const { return {}; }
};
template <class Tile>
struct GroupScalePointer<Tile, true> {
  const bfloat16* address;

  NBL_DEVICE GroupScalePointer() {}
  NBL_DEVICE GroupScalePointer(const LinearParams& p, int64_t row, int k)
      : address(static_cast<const bfloat16*>(p.weight_scale) +
                row * ((p.k + int{kInt4Group} - 1) / int{kInt4Group}) + k / int{kInt4Group}) {}
  NBL_DEVICE void advance(int k) { address += k / int{kInt4Group}; }

  // Of the four lanes that share a group the later ones may have no k left before `end`; their
  // sums are of all four.
  NBL_DEVICE GroupScale<Tile> load(int k, int end) const {
    GroupScale<Tile> scale = {};
    if (k < end + static_cast<int>(threadIdx.x) % 4 * 8) {
      scale.bits = address[k / int{kInt4Group}];
    }
    return scale;
  }
};

// ---- The products of one warp ------------------------------------------------------------------

// For lane 4g + t: rows 16i + g and 16i + 8 + g of the tile, tokens 8j + g. Of the k of a step it
// has those of its 16 bytes of weights, from first_k on.
template <class Tile>
struct MmaProducts {
  using T = typename Tile::T;
  static constexpr int kRowTiles = Tile::kRows / 16;
  static constexpr int kTokenTiles = Tile::kTokens / 8;
  static constexpr int kTokens = Tile::kTokens;
  static constexpr int kParts = Tile::kParts;

  struct Weights {
    Bytes16 granule[kRowTiles][2];
    GroupScale<Tile> scale[kRowTiles][2];
  };

  struct Inputs {
    Bytes16 x[kTokenTiles][kParts], gamma[kParts];
  };

  WeightPointer<Tile> weight[kRowTiles][2];  // at the k of this lane's next step, as all of these
  GroupScalePointer<Tile> weight_scale[kRowTiles][2];
  const T* x[kTokenTiles];
  const T* norm_weight;
  float scale[kTokenTiles];  // where kNormFirst
  float sums[kRowTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles][4] = {};  // x · xᵀ as mma leaves it; its diagonal counts

  NBL_DEVICE MmaProducts(const LinearParams& p, int lane, int k) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = weight_row<Tile>(p, 16 * i + 8 * half + g);
        weight[i][half] = WeightPointer<Tile>(p, row, k, t);
        weight_scale[i][half] = GroupScalePointer<Tile>(p, row, k);
      }
    }
    k += first_k(lane);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x[j] = token_row<Tile>(p, 8 * j + g) + k;
    norm_weight = static_cast<const T*>(p.norm_weight) + k;
  }

  NBL_DEVICE void advance(int k) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[i][half].advance(k);
        weight_scale[i][half].advance(k);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x[j] += k;
    norm_weight += k;
  }

  NBL_DEVICE static int first_k(int lane) { return lane % 4 * (Tile::kGroups ? 8 : Tile::kLaneK); }

  NBL_DEVICE void prefetch(int k) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      weight[i][0].prefetch(k);
      weight[i][1].prefetch(k);
    }
  }

  NBL_DEVICE void set_scale(const float* token_scale, int lane) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) scale[j] = token_scale[8 * j + lane / 4];
  }

  NBL_DEVICE void load_weights(Weights& w, int k, int left) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w.granule[i][half] = weight[i][half].load(k, left);
        w.scale[i][half] = weight_scale[i][half].load(k, left);
      }
    }
  }

  NBL_DEVICE void load_inputs(Inputs& in, int k, int left) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int at = k + part * Tile::kPartStride;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        in.x[j][part] = load_granule<T, Tile::kVector>(x[j], at, left);
      }
      if constexpr (Tile::kNorm) {
        in.gamma[part] = load_granule<T, Tile::kVector>(norm_weight, at, left);
      }
    }
  }

  // x · scale · γ, rounded once.
  NBL_DEVICE static Bytes16 normalize(const Bytes16& granule, float scale, const Bytes16& gamma) {
    float v[8], factor[8];
    unpack<T>(granule, v);
    unpack<T>(gamma, factor);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = v[e] * scale * factor[e];
    return pack<T>(v);
  }

  // x · γ, rounded.
  NBL_DEVICE static Bytes16 multiply_pairs(const Bytes16& granule, const Bytes16& gamma) {
    Bytes16 f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.word[i] = fma2<T>(granule.word[i], gamma.word[i], 0x80008000u);  // − 0: no change
    }
    return f;
  }

  // Σ x² of all tokens, by the units that have nothing else to do.
  NBL_DEVICE void add_squares(const Bytes16 (&x)[kTokenTiles][kParts], int part) {
    const Bytes16 &low = x[0][part], &high = x[kTokenTiles - 1][part];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[4] = {low.word[2 * half], high.word[2 * half], low.word[2 * half + 1],
                             high.word[2 * half + 1]};
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const uint32_t b[2] = {x[j][part].word[2 * half], x[j][part].word[2 * half + 1]};
        mma_m16n8k16<T>(squares[j], a, b);
      }
    }
  }

  NBL_DEVICE void multiply(const Weights& w, const Inputs& in) {
    uint32_t b[kParts][kTokenTiles][2][2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if constexpr (Tile::kNorm && !Tile::kNormFirst) add_squares(in.x, part);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        Bytes16 f = in.x[j][part];
        if constexpr (Tile::kNormFirst) {
          f = normalize(f, scale[j], in.gamma[part]);
        } else if constexpr (Tile::kNorm) {
          f = multiply_pairs(f, in.gamma[part]);
        }
#pragma unroll
        for (int word = 0; word < 4; ++word) b[part][j][word / 2][word % 2] = f.word[word];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if constexpr (Tile::kGroups) {
        float group[kTokenTiles][4] = {};
        multiply_rows(w.granule[i], b, group);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] += w.scale[i][e / 2].value() * group[j][e];
        }
      } else {
        multiply_rows(w.granule[i], b, sums[i]);
      }
    }
  }

  // Sixteen rows of a step.
  NBL_DEVICE static void multiply_rows(const Bytes16 (&granule)[2],
                                       const uint32_t (&b)[kParts][kTokenTiles][2][2],
                                       float (&d)[kTokenTiles][4]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Bytes16 low = widen<T>(typename Tile::W{}, granule[0], part);
      const Bytes16 high = widen<T>(typename Tile::W{}, granule[1], part);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {low.word[2 * half], high.word[2 * half], low.word[2 * half + 1],
                               high.word[2 * half + 1]};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) mma_m16n8k16<T>(d[j], a, b[part][j][half]);
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
      if (t == g / 2) {  // token 8 j + g is row g or g + 8, and column g = 2 t or 2 t + 1
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const float even = squares[j][2 * j], odd = squares[j][2 * j + 1];
          record[Tile::kRows * kTokens + 8 * j + g] = g % 2 == 0 ? even : odd;
        }
      }
    }
  }
};

// Every row and token of the tile, the k of this lane's 16 bytes of weights, from first_k on.
template <class Tile>
struct FmaProducts {
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kRows;
  static constexpr int kTokens = Tile::kTokens;
  static constexpr int kParts = Tile::kParts;
  static constexpr int kPartK = Tile::kPartK;
  static constexpr int kGranules = kPartK / kGranule<T>;  // of x, in a part

  struct Weights {
    Bytes16 granule[kRows];
    GroupScale<Tile> scale[kRows];
  };

  struct Inputs {
    Bytes16 x[kTokens][kParts][kGranules], gamma[kParts][kGranules];
  };

  WeightPointer<Tile> weight[kRows];  // at the k of this lane's next step, as all of these
  GroupScalePointer<Tile> weight_scale[kRows];
  const T* x[kTokens];
  const T* norm_weight;
  float sums[kRows][kTokens] = {};
  float squares[kTokens] = {};

  NBL_DEVICE FmaProducts(const LinearParams& p, int lane, int k) {
    const int group = Tile::kGroups ? lane / 4 * int{kInt4Group} : 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = weight_row<Tile>(p, r);
      weight[r] = WeightPointer<Tile>(p, row, k, lane);
      weight_scale[r] = GroupScalePointer<Tile>(p, row, k + group);
    }
    k += first_k(lane);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] = token_row<Tile>(p, j) + k;
    norm_weight = static_cast<const T*>(p.norm_weight) + k;
  }

  NBL_DEVICE void advance(int k) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      weight[r].advance(k);
      weight_scale[r].advance(k);
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] += k;
    norm_weight += k;
  }

  NBL_DEVICE static int first_k(int lane) {
    if constexpr (Tile::kGroups) return lane / 4 * int{kInt4Group} + lane % 4 * 8;
    return lane * Tile::kLaneK;
  }

  NBL_DEVICE void prefetch(int k) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) weight[r].prefetch(k);
  }

  NBL_DEVICE void load_weights(Weights& w, int k, int left) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      w.granule[r] = weight[r].load(k, left);
      w.scale[r] = weight_scale[r].load(k, left);
    }
  }

  NBL_DEVICE void load_inputs(Inputs& in, int k, int left) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kGranules; ++i) {
        const int at = k + part * Tile::kPartStride + i * kGranule<T>;
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          in.x[j][part][i] = load_granule<T, Tile::kVector>(x[j], at, left);
        }
        if constexpr (Tile::kNorm) {
          in.gamma[part][i] = load_granule<T, Tile::kVector>(norm_weight, at, left);
        }
      }
    }
  }

  NBL_DEVICE void multiply(const Weights& w, const Inputs& in) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float f[kTokens][kPartK];
      float gamma[kPartK];
      if constexpr (Tile::kNorm) unpack_all<T>(in.gamma[part], gamma);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        unpack_all<T>(in.x[j][part], f[j]);
        if constexpr (Tile::kNorm) {
#pragma unroll
          for (int e = 0; e < kPartK; ++e) {
            squares[j] += f[j][e] * f[j][e];
            f[j][e] *= gamma[e];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[kPartK];
        if constexpr (Tile::kQuantized) {
          unpack<float16>(widen<float16>(typename Tile::W{}, w.granule[r], part), v);
        } else {
          unpack<T>(w.granule[r], v);
        }
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          float sum = Tile::kGroups ? 0.0f : sums[r][j];
#pragma unroll
          for (int e = 0; e < kPartK; ++e) sum += v[e] * f[j][e];
          if constexpr (Tile::kGroups) sum = sums[r][j] + w.scale[r].value() * sum;
          sums[r][j] = sum;
        }
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
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens, kHalf = Tile::kHalf;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kTokens; i += kLinearThreads) {
    const int row = i % kRows, token = i / kRows;
    const int64_t n = first_output<Tile>(p) + row_output<Tile>(p, row);
    const int64_t m = first_token<Tile>(p) + token;
    if (n >= p.n || m >= p.m || row_half<Tile>(p, row) == 1) continue;
    float scale = 1.0f;
    if constexpr (Tile::kNorm && !Tile::kNormFirst) {
      scale = norm_scale(record[kRows * kTokens + token], p.k, p.norm_eps);
    }
    const auto sum = [&](int tile_row, int64_t weight_row) {
      const float value = record[tile_row * kTokens + token] * scale;
      if constexpr (!Tile::kQuantized || Tile::kGroups) return value;
      return value * static_cast<const float*>(p.weight_scale)[weight_row];
    };
    float value = sum(row, n);
    if (p.swiglu) value = silu(value) * sum(row + kHalf, p.n + n);
    if (p.bias) value += to_float(static_cast<const T*>(p.bias)[n]);
    if (p.residual) {
      value += to_float(static_cast<const T*>(p.residual)[m * p.residual_stride + n]);
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
  Products products(p, lane, static_cast<int>(begin) + warp * Tile::kStep);
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

  constexpr int kInputUnroll = Tile::kInputUnroll;
  typename Products::Weights weights[kUnroll];
  typename Products::Inputs inputs[kInputUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    products.load_weights(weights[u], u * kRound, left);
    if (u < kInputUnroll) products.load_inputs(inputs[u], u * kRound, left);
  }
#pragma unroll 1  // further unrolling brings no more steps into flight, but takes registers
  for (int64_t round = begin; round < end; round += kUnroll * kRound) {
    products.advance(kUnroll * kRound);
    left -= kUnroll * kRound;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      auto& input = inputs[u % kInputUnroll];
      products.multiply(weights[u], input);
      products.load_weights(weights[u], u * kRound, left);
      products.load_inputs(input, (u + kInputUnroll - kUnroll) * kRound, left);
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
