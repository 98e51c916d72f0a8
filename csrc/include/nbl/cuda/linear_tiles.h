// The parameters and the instances of the skinny linear (skinny_linear.cuh), and which of them runs
// a problem on which grid. Plain C++: for the kernel, its launchers, and those who compile it at
// run time.
#pragma once

#include "nbl/dtypes.h"

#if !defined(__CUDACC_RTC__)
#include <string>
#endif

namespace nbl {

struct LinearParams {
  const void* x;  // (m, k); strides are in elements, last dimensions contiguous
  int64_t x_stride;
  const void* norm_weight;  // (k), where kNorm
  float norm_eps;
  const void* weight;  // (n, k), or (2n, k) where kSwiglu
  int64_t weight_stride;
  const void* bias;      // (n) or null
  const void* residual;  // (m, n) or null
  int64_t residual_stride;
  void* out;  // (m, n)
  int64_t out_stride;
  int m, n, k;
  int split_k;         // what a split takes of k: a multiple of kLinearWarps * kStep
  float* partials;     // (blockIdx.x, splits, kRecord), where there are splits
  uint32_t* counters;  // one per blockIdx.x, zero before and after, where there are splits
  bool dependent;      // launched while the kernel before may still run
};

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = 32 * kLinearWarps;

template <class T>
constexpr bool kIsFloat16 = false;
template <>
constexpr bool kIsFloat16<float16> = true;

// One instance of the kernel.
template <class T_, bool kMma_, int kRows_, int kTokens_, int kUnroll_, bool kSwiglu_, bool kNorm_,
          bool kVector_>
struct LinearTile {
  using T = T_;
  static constexpr bool kMma = kMma_;
  static constexpr int kRows = kRows_;      // weight rows of a tile; mma: a multiple of 16
  static constexpr int kTokens = kTokens_;  // tokens of a block; mma: a multiple of 8
  static constexpr int kUnroll = kUnroll_;  // steps in flight
  static constexpr bool kSwiglu = kSwiglu_;
  static constexpr bool kNorm = kNorm_;
  static constexpr bool kVector = kVector_;  // all rows of x, γ and weight allow 16-byte loads

  static constexpr bool kNormFirst = kNorm && kMma && kIsFloat16<T>;
  static constexpr int kStep =
      kMma ? 32 : 512 / static_cast<int>(sizeof(T));  // k of one step of a warp
  // swiglu: of every 2 * kHalf rows the first half are gate rows, the second their up rows.
  static constexpr int kHalf = kMma ? 8 : 1;
  static constexpr int kOutputs = kSwiglu ? kRows / 2 : kRows;
  // What a warp, a block, a split has summed: (kRows, kTokens) products, then Σ x² per token.
  static constexpr int kRecord = kRows * kTokens + (kNorm && !kNormFirst ? kTokens : 0);
  // That there are registers for.
  static constexpr int kBlocksPerSm = !kMma && kTokens == 1 && kVector ? 3 : 2;
  static constexpr int kSharedBytes =
      ((kLinearWarps + 1) * kRecord + (kNormFirst ? kTokens : 0) + 1) * int{sizeof(float)};
};

#if !defined(__CUDACC_RTC__)  // the host's part: which instance, which grid

struct LinearProblem {
  DType dtype;
  bool swiglu, norm;
  bool vector;      // x, γ and weight: k and row strides of whole granules, 16-byte addresses
  int64_t m, n, k;  // all positive but k, which may be 0
  int sm_count;
  int splits;  // 0: as many as the machine has room for
};

struct LinearGeometry {
  int grid_x, grid_y;  // tiles · token groups, splits
  int split_k;
  int shared_bytes;
  int64_t partials;  // floats of workspace
  int64_t counters;
};

// The table of sizes. It is by calculation and has not been measured.
//
// To keep the memory busy, bandwidth × latency must be in flight: at about 0.8 µs under load that
// is 14 KiB per SM of an A100 (2.0 TB/s, 108 SMs), 20 of an H100 (3.35, 132), 28 of an H200 (4.8,
// 132), 42 of a B200 (8.0, 148). A lane has kUnroll granules of 4 rows (fma), 2 rows (mma, kRows
// 16) or 4 rows (32) in flight, so the 256 lanes of a block have 32 KiB (mma of 16 rows with norm,
// whose arithmetic takes registers: 24), and registers are for two or three blocks per SM, so that
// one block's beginning and end are covered by another's middle.
//
//   dtype    tokens   products   kRows   kTokens   kUnroll
//   16-bit   1        fma        4       1         2
//   16-bit   2…8      mma        16      8         4, with norm 3
//   16-bit   9…16     mma        16      16        4, with norm 3
//   16-bit   2…16     mma        32      8, 16     2        where that still leaves 4 tiles per SM:
//                                                           x is read half as often
//   float32  1        fma        4       1         2
//   float32  2…       fma        4       4         2
//
// Without 16-byte loads: the small tile whatever the size, and fewer steps in flight.
constexpr int64_t kMostSkinnyRows = 16;  // rows of x up to which these kernels are meant to be used
constexpr int kTilesPerSm = 4;

// Calls visitor(tile) with a value of the LinearTile to launch.
template <class T, bool kSwiglu, bool kNorm, bool kVector, class Visitor>
void visit_tile(const LinearProblem& p, const Visitor& visitor) {
  constexpr int kFmaUnroll = kVector ? 2 : 1, kMmaUnroll = kVector ? (kNorm ? 3 : 4) : 2;
  if (p.m == 1) return visitor(LinearTile<T, false, 4, 1, kFmaUnroll, kSwiglu, kNorm, kVector>{});
  if constexpr (sizeof(T) == 4) {
    visitor(LinearTile<T, false, 4, 4, kFmaUnroll, kSwiglu, kNorm, kVector>{});
  } else {
    if constexpr (kVector) {
      const int64_t rows = p.swiglu ? 2 * p.n : p.n;
      if (rows >= int64_t{32} * kTilesPerSm * p.sm_count) {
        if (p.m <= 8) return visitor(LinearTile<T, true, 32, 8, 2, kSwiglu, kNorm, kVector>{});
        return visitor(LinearTile<T, true, 32, 16, 2, kSwiglu, kNorm, kVector>{});
      }
    }
    if (p.m <= 8) return visitor(LinearTile<T, true, 16, 8, kMmaUnroll, kSwiglu, kNorm, kVector>{});
    visitor(LinearTile<T, true, 16, 16, kMmaUnroll, kSwiglu, kNorm, kVector>{});
  }
}

template <class T, class Visitor>
void visit_typed_tile(const LinearProblem& p, const Visitor& visitor) {
  if (p.swiglu) {
    return p.vector ? visit_tile<T, true, true, true>(p, visitor)
                    : visit_tile<T, true, true, false>(p, visitor);
  }
  if (p.norm) {
    return p.vector ? visit_tile<T, false, true, true>(p, visitor)
                    : visit_tile<T, false, true, false>(p, visitor);
  }
  return p.vector ? visit_tile<T, false, false, true>(p, visitor)
                  : visit_tile<T, false, false, false>(p, visitor);
}

template <class Visitor>
void with_linear_tile(const LinearProblem& p, const Visitor& visitor) {
  switch (p.dtype) {
    case DType::kFloat32:
      return visit_typed_tile<float>(p, visitor);
    case DType::kBFloat16:
      return visit_typed_tile<bfloat16>(p, visitor);
    case DType::kFloat16:
      return visit_typed_tile<float16>(p, visitor);
  }
}

// Splits of k only where the tiles leave SMs idle, and no shorter than one filling of the ring.
template <class Tile>
LinearGeometry linear_geometry(const LinearProblem& p) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  constexpr int64_t kRound = int64_t{kLinearWarps} * Tile::kStep;
  const int64_t blocks = up(p.n, Tile::kOutputs) * up(p.m, Tile::kTokens);
  const int64_t rounds = p.k > 0 ? up(p.k, kRound) : 1;
  int64_t splits = p.splits;
  if (splits == 0 && blocks < p.sm_count) {
    const int64_t room = Tile::kBlocksPerSm * p.sm_count / blocks, most = rounds / Tile::kUnroll;
    splits = room < most ? room : most;
  }
  splits = splits < 1 ? 1 : splits > rounds ? rounds : splits;
  const int64_t split_k = up(rounds, splits) * kRound;
  splits = up(rounds * kRound, split_k);
  const bool split = splits > 1;
  return {static_cast<int>(blocks),
          static_cast<int>(splits),
          static_cast<int>(split_k),
          Tile::kSharedBytes,
          split ? blocks * splits * Tile::kRecord : 0,
          split ? blocks : 0};
}

// As NVRTC is asked for it: "nbl::skinny_linear<nbl::LinearTile<nbl::bfloat16, true, 16, …>>".
template <class Tile>
std::string linear_kernel_name() {
  using T = typename Tile::T;
  const auto flag = [](bool value) { return std::string(value ? ", true" : ", false"); };
  const auto number = [](int value) { return ", " + std::to_string(value); };
  return std::string("nbl::skinny_linear<nbl::LinearTile<") +
         (sizeof(T) == 4  ? "float"
          : kIsFloat16<T> ? "nbl::float16"
                          : "nbl::bfloat16") +
         flag(Tile::kMma) + number(Tile::kRows) + number(Tile::kTokens) + number(Tile::kUnroll) +
         flag(Tile::kSwiglu) + flag(Tile::kNorm) + flag(Tile::kVector) + ">>";
}

#endif  // __CUDACC_RTC__

}  // namespace nbl
