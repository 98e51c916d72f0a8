// What is learned and done about columns (channels) before any product is formed: column sums,
// shifts, and the packing of inputs that the Gram kernels cannot read in place.
//
//              joint columns [features | targets | block], 256 to a block of threads
//   tokens   ┌──────────┬──────────┬────┐
//   part 0   │ warp w takes the tokens w, w + 8, …; a lane 8 columns; sums and squares run in
//            ├──────────┼──────────┼────┤  float32 over 8 tokens, then go to float64
//   part 1   │          │          │    │
//            └──────────┴──────────┴────┘
// column_stats writes one pair of float64 sums per (part, column); column_shifts adds the parts in
// order, so that nothing depends on how blocks are scheduled, and decides which columns to shift.
//
// Why shift: float32 sums of products carry an error of a few 1e-7 of the mean square, mean² +
// variance. Up to |mean| = 3 std that is ten variances at most, which keeps correlations right to
// 1e-5; beyond, x - s is multiplied instead, s the mean rounded to the type of the input, and the
// shift is undone in float64 (gram.cuh). (The CPU, whose float32 sums round to nearest, waits until
// 8 std; tensor cores cut off, and their errors do not average out.)
//
// Nothing is lost by the shift: x - s is exact in float32 wherever x is within a factor of two of
// s (Sterbenz), and rounded like any float32 where it is not. Packed, it becomes the sum of two
// bfloat16 numbers, high + low (17 bits: exact near s; elsewhere rounded by at most 2^-18 of
// itself, at random), and float32 inputs become the sum of three (24 bits, always exact). Tiles
// of columns whose low part is zero throughout say so and cost no more than before.
#pragma once

#include "ptx.cuh"

namespace nbl {

constexpr int kMaxInputs = 3;        // features, targets, block
constexpr int kOctet = 8;            // columns that one thread reads at once
constexpr int kColumnThreads = 256;  // of every kernel of this file
constexpr int kColumnWarps = kColumnThreads / 32;
constexpr int kColumnGroup = 32 * kOctet;      // columns per block
constexpr int kStatsRun = 8;                   // tokens added up in float32
constexpr int kPackTokens = 8 * kColumnWarps;  // per block

constexpr double kMaxSquares = 3e38;    // of a column: its products are summed up in float32
constexpr float kMaxMagnitude = 1e18f;  // what a refused column is searched for
constexpr double kShiftRatio = 3.0;     // |mean| / std

struct TokenColumns {  // (tokens, dim), rows `stride` elements apart
  const void* data;
  int64_t stride;
  int dim;
  bool octets;  // rows start at multiples of 16 bytes
};

struct ColumnFlags {     // what the host reads before it lets anything be accumulated
  uint64_t first_bad;    // the first joint column with a value that is not finite, or too large
  uint64_t first_token;  // and the first token at which it is; found by first_bad_token
  int64_t count;         // tokens counted
  uint32_t shifted[kMaxInputs + 1];  // 1: some column of this input has a shift
};

struct ColumnStatsParams {
  TokenColumns inputs[kMaxInputs];
  int num_inputs;
  int columns;          // of all inputs
  const uint8_t* mask;  // (tokens), 0: the token does not count; or null
  int64_t tokens, part_tokens;
  double* partial;   // (parts, 2, columns): sums and squares
  uint32_t* counts;  // (parts)
  ColumnFlags* flags;
};

struct ColumnStatsGrid {
  unsigned groups, parts;
  int64_t part_tokens;
};

NBL_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most 64 parts, of at least 256 tokens: fixed, so that the sums depend on nothing else.
NBL_HOST_DEVICE inline ColumnStatsGrid column_stats_grid(const int64_t* dims, int num_inputs,
                                                         int64_t tokens) {
  ColumnStatsGrid grid{0, 0, 0};
  for (int i = 0; i < num_inputs; ++i)
    grid.groups += static_cast<unsigned>(ceil_div(dims[i], kColumnGroup));
  grid.part_tokens = ceil_div(ceil_div(tokens, 64), 64) * 64;
  if (grid.part_tokens < 256) grid.part_tokens = 256;
  grid.parts = static_cast<unsigned>(ceil_div(tokens, grid.part_tokens));
  return grid;
}

constexpr size_t kColumnStatsShared = sizeof(double) * kColumnWarps * 2 * kColumnGroup;

template <class T>
NBL_DEVICE void unpack_octet(float (&values)[kOctet], const T* from) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Bytes16 v = load_streaming(from + 4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * half + i] = bits_to_float(v.word[i]);
    }
  } else {
    const Bytes16 v = load_streaming(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float2 pair = unpack2<T>(v.word[i]);
      values[2 * i] = pair.lo;
      values[2 * i + 1] = pair.hi;
    }
  }
}

// `width` columns (at most 8, none if negative) of one token; zeros for the rest.
template <class T>
NBL_DEVICE void load_octet(float (&values)[kOctet], const T* from, int width, bool octets) {
  if (octets && width >= kOctet) return unpack_octet(values, from);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = i < width ? to_float(from[i]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2) column_stats(NBL_PARAM ColumnStatsParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int input = 0, group = blockIdx.x, first_column = 0;
  while (group * kColumnGroup >= p.inputs[input].dim) {  // of an empty input: no group
    group -= (p.inputs[input].dim + kColumnGroup - 1) / kColumnGroup;
    first_column += p.inputs[input++].dim;
  }
  const TokenColumns& in = p.inputs[input];
  const int column = group * kColumnGroup + lane * kOctet, width = in.dim - column;
  const T* columns = static_cast<const T*>(in.data) + (width > 0 ? column : 0);
  const int64_t begin = blockIdx.y * p.part_tokens;
  const int64_t end = begin + p.part_tokens < p.tokens ? begin + p.part_tokens : p.tokens;

  double sums[kOctet] = {}, squares[kOctet] = {};
  uint32_t count = 0;
  for (int64_t run = begin + warp; run < end; run += kColumnWarps * kStatsRun) {
    float run_sums[kOctet] = {}, run_squares[kOctet] = {};
#pragma unroll
    for (int i = 0; i < kStatsRun; ++i) {
      int64_t token = run + i * kColumnWarps;
      bool counted = token < end;
      if (!counted) token = begin;  // loaded, like those under the mask, and not looked at
      if (p.mask) counted = counted && p.mask[token];
      float v[kOctet];
      load_octet(v, columns + token * in.stride, width, in.octets);
#pragma unroll
      for (int c = 0; c < kOctet; ++c) {
        const float x = counted ? v[c] : 0.0f;
        if constexpr (sizeof(T) == 4)
          sums[c] += x;  // a large mean leaves float32 no bits for the rest; eight 16-bit values it
        else             // adds up exactly
          run_sums[c] += x;
        run_squares[c] += x * x;
      }
      count += counted;
    }
#pragma unroll
    for (int c = 0; c < kOctet; ++c) {
      sums[c] += run_sums[c];
      squares[c] += run_squares[c];
    }
  }

  double* shared = reinterpret_cast<double*>(shared_memory());  // (warp, 2, column)
#pragma unroll
  for (int c = 0; c < kOctet; ++c) {
    shared[(warp * 2 + 0) * kColumnGroup + lane * kOctet + c] = sums[c];
    shared[(warp * 2 + 1) * kColumnGroup + lane * kOctet + c] = squares[c];
  }
  sync_block();
  const int mine = group * kColumnGroup + threadIdx.x;
  if (mine < in.dim) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      double sum = 0;
      for (int w = 0; w < kColumnWarps; ++w)
        sum += shared[(w * 2 + which) * kColumnGroup + threadIdx.x];
      p.partial[(int64_t{blockIdx.y} * 2 + which) * p.columns + first_column + mine] = sum;
    }
  }
  if (blockIdx.x > 0) return;  // the whole block; the first group also counts the tokens
  sync_block();
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared_memory());
  if (lane == 0) counts[warp] = count;
  sync_block();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kColumnWarps; ++w) count += counts[w];
  p.counts[blockIdx.y] = count;
  if (blockIdx.y == 0) *p.flags = {~uint64_t{0}, ~uint64_t{0}, 0, {}};
}

struct ColumnShiftParams {
  const double* partial;
  const uint32_t* counts;
  int parts, columns;
  int first_column[kMaxInputs + 1];  // of each input, and the end
  int num_inputs;
  double* sums;   // (columns): Σ x over the tokens that count
  float* shifts;  // (columns), zero: none
  ColumnFlags* flags;
};

template <class T>
__global__ void __launch_bounds__(kColumnThreads) column_shifts(NBL_PARAM ColumnShiftParams p) {
  const int column = blockIdx.x * kColumnThreads + threadIdx.x;
  if (column >= p.columns) return;
  int64_t count = 0;
  double sum = 0, squares = 0;
  for (int part = 0; part < p.parts; ++part) {
    const double* partial = p.partial + int64_t{part} * 2 * p.columns + column;
    count += p.counts[part];
    sum += partial[0];
    squares += partial[p.columns];
  }
  if (column == 0) p.flags->count = count;
  float shift = 0.0f;
  if (!(squares < kMaxSquares)) {
    atomic_min(&p.flags->first_bad, static_cast<uint64_t>(column));
  } else if (count > 0) {
    const double mean = sum / static_cast<double>(count);
    const double variance = squares / static_cast<double>(count) - mean * mean;
    const double limit = variance > 0 ? kShiftRatio * kShiftRatio * variance : 0.0;
    if (mean * mean > limit) shift = to_float(from_float<T>(static_cast<float>(mean)));
  }
  p.sums[column] = sum;
  p.shifts[column] = shift;
  if (shift == 0.0f) return;
  int input = 0;
  while (column >= p.first_column[input + 1]) ++input;
  p.flags->shifted[input] = 1;  // many threads may, all write the same
}

struct BadTokenParams {
  const void* column;  // of the first bad column, token 0
  int64_t stride;
  const uint8_t* mask;
  int64_t tokens;
  ColumnFlags* flags;
};

// The first token that counts and whose value cannot be accumulated. Only ever run before an error.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) first_bad_token(NBL_PARAM BadTokenParams p) {
  const int64_t threads = int64_t{gridDim.x} * kColumnThreads;
  for (int64_t t = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x; t < p.tokens; t += threads) {
    if (p.mask && !p.mask[t]) continue;
    const float value = to_float(static_cast<const T*>(p.column)[t * p.stride]);
    if (value < kMaxMagnitude && value > -kMaxMagnitude) continue;
    atomic_min(&p.flags->first_token, static_cast<uint64_t>(t));
    return;
  }
}

struct CommitParams {
  const double* new_sums;
  double* sums;
  int columns;
  int64_t new_count;
  int64_t* count;
};

static __global__ void __launch_bounds__(kColumnThreads) commit_sums(NBL_PARAM CommitParams p) {
  const int column = blockIdx.x * kColumnThreads + threadIdx.x;
  if (column < p.columns) p.sums[column] += p.new_sums[column];
  if (column == 0) *p.count += p.new_count;
}

struct PackParams {
  TokenColumns in;
  const uint8_t* mask;  // (tokens) or null: tokens that do not count become zeros
  const float* shifts;  // (dim) or null
  int64_t tokens;
  void* out;  // (parts, tokens, out_stride), zeros beyond dim
  int64_t out_stride, part_stride;
  uint32_t* nonzero;  // (parts - 1, column tiles): 1 where a part above the first is not zero
  int column_tiles, tile_columns;
};

// kParts 1: values as they are, Out is T. 2, 3: x - shift as a sum of as many bfloat16 numbers.
template <class T, class Out, int kParts>
__global__ void __launch_bounds__(kColumnThreads) pack_tokens(NBL_PARAM PackParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.x * kColumnGroup + lane * kOctet, width = p.in.dim - column;
  if (column >= p.out_stride) return;
  float shifts[kOctet] = {};
  if (p.shifts)
    for (int c = 0; c < kOctet; ++c) shifts[c] = c < width ? p.shifts[column + c] : 0.0f;
  const T* columns = static_cast<const T*>(p.in.data) + column;
  const int64_t begin = int64_t{blockIdx.y} * kPackTokens + warp;
  uint32_t nonzero[kParts] = {};
#pragma unroll
  for (int i = 0; i < kPackTokens / kColumnWarps; ++i) {
    const int64_t token = begin + i * kColumnWarps;
    if (token >= p.tokens) break;
    float v[kOctet] = {};
    if (!p.mask || p.mask[token]) {
      load_octet(v, columns + token * p.in.stride, width, p.in.octets);
#pragma unroll
      for (int c = 0; c < kOctet; ++c) v[c] -= shifts[c];
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Bytes16 packed;
#pragma unroll
      for (int c = 0; c < kOctet; c += 2) {
        const uint32_t pair = pack2<Out>(v[c], v[c + 1]);
        const Float2 taken = unpack2<Out>(pair);
        v[c] -= taken.lo;  // exact
        v[c + 1] -= taken.hi;
        packed.word[c / 2] = pair;
        nonzero[part] |= pair & 0x7fff7fffu;
      }
      store_16(static_cast<Out*>(p.out) + part * p.part_stride + token * p.out_stride + column,
               packed);
    }
  }
#pragma unroll
  for (int part = 1; part < kParts; ++part)
    if (nonzero[part]) p.nonzero[(part - 1) * p.column_tiles + column / p.tile_columns] = 1;
}

}  // namespace nbl
