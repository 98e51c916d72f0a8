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
  const void* weight;        // (n, k), or (2n, k) where swiglu; int4: (…, 64 · ceil(k / 128)) bytes
  int64_t weight_stride;     // int4: bytes
  const void* weight_scale;  // of a quantized weight: float32 per row; int4: bfloat16 per group
  const void* bias;          // (n) or null
  const void* residual;      // (m, n) or null
  int64_t residual_stride;
  void* out;  // (m, n)
  int64_t out_stride;
  int m, n, k;
  bool swiglu;
  int split_k;         // what a split takes of k: a multiple of kLinearWarps * kStep
  float* partials;     // (blockIdx.x, splits, kRecord), where there are splits
  uint32_t* counters;  // one per blockIdx.x, zero before and after, where there are splits
  bool dependent;      // launched while the kernel before may still run
};

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = 32 * kLinearWarps;

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

// One instance of the kernel. W is what the weight is stored as: T, or int8_t, float8_e4m3,
// int4_group.
template <class T_, class W_, bool kMma_, int kRows_, int kTokens_, int kUnroll_, bool kNorm_,
          bool kVector_>
struct LinearTile {
  using T = T_;
  using W = W_;
  static constexpr bool kMma = kMma_;
  static constexpr int kRows = kRows_;      // weight rows of a tile; mma: a multiple of 16
  static constexpr int kTokens = kTokens_;  // tokens of a block; mma: a multiple of 8
  static constexpr int kUnroll = kUnroll_;  // steps of the weight in flight
  static constexpr bool kNorm = kNorm_;
  static constexpr bool kVector = kVector_;  // all rows of x, γ and weight allow 16-byte loads

  static constexpr bool kQuantized = !kSameType<T, W>;
  static constexpr bool kGroups = kSameType<W, int4_group>;  // scales by group, else by row
  // The weights of a lane's 16 bytes, and how they meet x: kParts times kPartK consecutive ones.
  static constexpr int kLaneK = kGroups ? 32 : 16 / static_cast<int>(sizeof(W));
  static constexpr int kPartK = kQuantized ? 8 : kLaneK;
  static constexpr int kParts = kLaneK / kPartK;
  static constexpr int kPartStride = kGroups ? kInt4Group / 4 : kPartK;
  static constexpr int kInputUnroll = kQuantized ? 1 : kUnroll;  // steps of x and γ in flight

  static constexpr bool kNormFirst = kNorm && kMma && kSameType<T, float16>;
  static constexpr int kStep = (kMma ? 4 : 32) * kLaneK;  // k of one step of a warp
  // swiglu: of every 2 * kHalf rows the first half are gate rows, the second their up rows.
  static constexpr int kHalf = kMma ? 8 : 1;
  // What a warp, a block, a split has summed: (kRows, kTokens) products, then Σ x² per token.
  static constexpr int kRecord = kRows * kTokens + (kNorm && !kNormFirst ? kTokens : 0);
  // That there are registers for.
  static constexpr int kBlocksPerSm =
      !kMma && kTokens == 1 && kVector && !(kQuantized && sizeof(T) == 4) ? 3 : 2;
  static constexpr int kSharedBytes =
      ((kLinearWarps + 1) * kRecord + (kNormFirst ? kTokens : 0) + 1) * int{sizeof(float)};
};

#if !defined(__CUDACC_RTC__)  // the host's part: which instance, which grid

struct LinearProblem {
  DType dtype;
  WeightFormat format;
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

// The table of sizes. For bfloat16 without norm it is the best of a sweep on an H200
// (benchmarks/results/gpu-nvidia-h200-2026-11-26T1934-sweep.jsonl; d = 2048, 4096, 8192); the rest
// follows it or is by calculation.
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
//   16-bit   2…8      mma        16      8         2
//   16-bit   9…16     mma        16      16        4, with norm 3
//   16-bit   9…16     mma        32      16        2        where that still leaves 3 tiles for 2
//                                                           SMs: x is read half as often
//   float32  1        fma        4       1         2
//   float32  2…       fma        4       4         2
//
// Without 16-byte loads: the small tile whatever the size, and fewer steps in flight.
//
// Quantized weights leave less time per weight. In a cycle an SM of an H100 gets 15 bytes and
// issues 128 instructions of single lanes: 8.5 for a weight of 8 bits, 4.3 for one of 4. The loops
// compiled for sm_90a, bfloat16, have per weight
//
//                       fma      mma, 8 tokens    mma, 16 tokens
//   int8, fp8 (norm)    5        4.2              5.3
//   int4                         2.1              2.6
//   int4 with norm               3.3              5.2
//
// By fma int4 would need more than there are, so it takes mma for one token too. A granule meets
// two (int4: four) times as much of x, whose registers are in flight for one step only.
//
//   weight      dtype    tokens   products   kRows   kTokens   kUnroll
//   int8, fp8   16-bit   1        fma        4       1         1
//   all         16-bit   …8       mma        16      8         3, int4 with norm 2
//   all         16-bit   9…16     mma        16      16        2, int4 with norm 1
//   int8, fp8   float32  all      fma        4       1         1
//   int4        float32  all      fma        2       1         1
//
// Without 16-byte loads: mma of 16 rows and 8 tokens, one step in flight.
constexpr int64_t kMostSkinnyRows = 16;  // rows of x up to which these kernels are meant to be used
// A split is at least so many fillings of the ring: that splits meet takes about two (measured).
constexpr int kFillingsPerSplit = 4;

// Calls visitor(tile) with a value of the LinearTile to launch.
template <class T, bool kNorm, bool kVector, class Visitor>
void visit_plain_tile(const LinearProblem& p, const Visitor& visitor) {
  constexpr int kFmaUnroll = kVector ? 2 : 1, kMmaUnroll = kVector ? (kNorm ? 3 : 4) : 2;
  if (p.m == 1) return visitor(LinearTile<T, T, false, 4, 1, kFmaUnroll, kNorm, kVector>{});
  if constexpr (sizeof(T) == 4) {
    visitor(LinearTile<T, T, false, 4, 4, kFmaUnroll, kNorm, kVector>{});
  } else {
    if (p.m <= 8) return visitor(LinearTile<T, T, true, 16, 8, 2, kNorm, kVector>{});
    if constexpr (kVector) {
      const int64_t rows = p.swiglu ? 2 * p.n : p.n;
      if (2 * rows >= int64_t{32} * 3 * p.sm_count)
        return visitor(LinearTile<T, T, true, 32, 16, 2, kNorm, kVector>{});
    }
    visitor(LinearTile<T, T, true, 16, 16, kMmaUnroll, kNorm, kVector>{});
  }
}

template <class T, class W, bool kNorm, bool kVector, class Visitor>
void visit_quantized_tile(const LinearProblem& p, const Visitor& visitor) {
  constexpr bool kInt4 = kSameType<W, int4_group>;
  constexpr int kUnroll = kInt4 && kNorm ? 2 : 3;
  if constexpr (sizeof(T) == 4) {
    visitor(LinearTile<T, W, false, kInt4 ? 2 : 4, 1, 1, kNorm, kVector>{});
  } else {
    if constexpr (kVector) {
      if constexpr (!kInt4) {
        if (p.m == 1) return visitor(LinearTile<T, W, false, 4, 1, 1, kNorm, kVector>{});
      }
      if (p.m > 8) return visitor(LinearTile<T, W, true, 16, 16, kUnroll - 1, kNorm, kVector>{});
    }
    visitor(LinearTile<T, W, true, 16, 8, kVector ? kUnroll : 1, kNorm, kVector>{});
  }
}

template <class T, class W, bool kNorm, bool kVector, class Visitor>
void visit_tile(const LinearProblem& p, const Visitor& visitor) {
  if constexpr (kSameType<T, W>) {
    visit_plain_tile<T, kNorm, kVector>(p, visitor);
  } else {
    visit_quantized_tile<T, W, kNorm, kVector>(p, visitor);
  }
}

template <class T, class W, class Visitor>
void visit_typed_tile(const LinearProblem& p, const Visitor& visitor) {
  if (p.norm) {
    return p.vector ? visit_tile<T, W, true, true>(p, visitor)
                    : visit_tile<T, W, true, false>(p, visitor);
  }
  return p.vector ? visit_tile<T, W, false, true>(p, visitor)
                  : visit_tile<T, W, false, false>(p, visitor);
}

template <class T, class Visitor>
void visit_format(const LinearProblem& p, const Visitor& visitor) {
  switch (p.format) {
    case WeightFormat::kPlain:
      return visit_typed_tile<T, T>(p, visitor);
    case WeightFormat::kInt8:
      return visit_typed_tile<T, int8_t>(p, visitor);
    case WeightFormat::kFp8:
      return visit_typed_tile<T, float8_e4m3>(p, visitor);
    case WeightFormat::kInt4:
      return visit_typed_tile<T, int4_group>(p, visitor);
  }
}

template <class Visitor>
void with_linear_tile(const LinearProblem& p, const Visitor& visitor) {
  switch (p.dtype) {
    case DType::kFloat32:
      return visit_format<float>(p, visitor);
    case DType::kBFloat16:
      return visit_format<bfloat16>(p, visitor);
    case DType::kFloat16:
      return visit_format<float16>(p, visitor);
  }
}

// Splits of k only where the tiles leave SMs idle and k is long.
template <class Tile>
LinearGeometry linear_geometry(const LinearProblem& p) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  constexpr int64_t kRound = int64_t{kLinearWarps} * Tile::kStep;
  const int64_t outputs = p.swiglu ? Tile::kRows / 2 : Tile::kRows;
  const int64_t blocks = up(p.n, outputs) * up(p.m, Tile::kTokens);
  const int64_t rounds = p.k > 0 ? up(p.k, kRound) : 1;
  int64_t splits = p.splits;
  if (splits == 0 && blocks < p.sm_count) {
    const int64_t room = Tile::kBlocksPerSm * p.sm_count / blocks,
                  most = rounds / (kFillingsPerSplit * Tile::kUnroll);
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

template <class T>
std::string linear_type_name() {
  if (kSameType<T, float>) return "float";
  if (kSameType<T, bfloat16>) return "nbl::bfloat16";
  if (kSameType<T, float16>) return "nbl::float16";
  if (kSameType<T, int8_t>) return "signed char";
  return kSameType<T, float8_e4m3> ? "nbl::float8_e4m3" : "nbl::int4_group";
}

// As NVRTC is asked for it: "nbl::skinny_linear<nbl::LinearTile<nbl::bfloat16, …, true, 16, …>>".
template <class Tile>
std::string linear_kernel_name() {
  const auto flag = [](bool value) { return std::string(value ? ", true" : ", false"); };
  const auto number = [](int value) { return ", " + std::to_string(value); };
  return "nbl::skinny_linear<nbl::LinearTile<" + linear_type_name<typename Tile::T>() + ", " +
         linear_type_name<typename Tile::W>() + flag(Tile::kMma) + number(Tile::kRows) +
         number(Tile::kTokens) + number(Tile::kUnroll) + flag(Tile::kNorm) + flag(Tile::kVector) +
         ">>";
}

#endif  // __CUDACC_RTC__

}  // namespace nbl
