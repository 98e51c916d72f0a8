// Streaming Gram matrices on tensor cores: out (float64) += Σ_tokens x_i y_j for the products
//   0: ff (upper triangle)   1: tf   2: tt (upper)   3: bf   4: bb (upper)
// of features f, targets t and block b, several layers to a launch.
//
//            columns of y, 128 to a tile            tokens →
//          ┌──┬──┬──┬──┐                          ┌──┬──┬──┬──┬──┬──┬──┬──┬
//  columns │1 │2 │4 │  │  bands of 8 tile rows,   │ 32 tokens to a slab; cp.async fetches a
//   of x   ├──┼──┼──┼──┤  column after column:    │ slab of both operands three slabs ahead
//          │  │3 │5 │  │  blocks that run at the  └──┴──┴──┴──┴──┴──┴──┴──┴
//          ├──┼──┼──┼──┤  same time share both     accumulators ── every 32 tokens ──▶ float32
//          │  │  │6 │  │  operands in L2           registers ── every 8192 ──▶ float64 in memory
//          └──┴──┴──┴──┘
//
// One block of 8 warps computes a tile, a warp 64 x 32 of it: 16 mma.m16n8k16 for 6 ldmatrix. The
// tokens, which are contracted, are the slow dimension of both operands in memory, so fragments
// are loaded transposed. A slab of 128 columns is stored as 32 rows of 256 bytes, its 16-byte
// chunk c of token t at place c xor (t mod 8): the eight rows of an ldmatrix (tokens t … t+7, same
// c) are a multiple of 128 bytes apart and fall on eight different 16-byte banks, and so do the
// eight chunks that a quarter of a warp writes. Where tiles are too few to fill the machine, the
// tokens are split too; the parts go to a workspace and gram_combine adds them in order.
//
// Error budget. Products of 16-bit numbers are exact, but a tensor core aligns 8 or 16 of them to
// the largest (or to the accumulator) and cuts off: each instruction loses up to one unit in the
// last place, always towards zero, so the loss grows with the number of tokens instead of
// averaging out. After 32 tokens the accumulators are therefore added to float32 registers,
// rounding to nearest: what is cut off is then about 1e-7 of the mean square, and the roundings of
// at most 8192 / 32 such additions average out to another 1e-7. Measured on an H200: runs of 64
// lose more than 1e-6 of 20,000 hard tokens, tensor cores throughout 9e-6 of 8192 random ones.
//
// An operand can be the sum of several parts (column_stats.cuh): all slabs are then visited once
// for each pair of parts that is needed, the smallest products first, since added to sums of
// larger ones they would vanish (Σ low² of a float32 input, never negative, is 1e-6 of the whole).
// Products below 2^-26 of the leading one are left out.
// Shifted columns v = x - s are put right in float64, with Σ over the tokens counted, n of them:
//   Σ x_i y_j = Σ v_i v_j + (Σ x_i - n s_i) s_j + s_i Σ y_j.
#pragma once

#include "column_stats.cuh"

namespace nbl {

constexpr int kGramTile = 128;
constexpr int kGramBand = 8;  // tile rows
constexpr int kMaxProducts = 5;
constexpr int kMaxGramProblems = 8;    // per launch
constexpr int64_t kGramSpan = 8192;    // tokens of a launch: what float32 sums up before float64
constexpr int64_t kSplitTokens = 256;  // splits are multiples of it

constexpr int kGramThreads = 256;
constexpr int kGramSlab = 32;
constexpr int kGramStages = 4;
constexpr int kSlabBytes = kGramSlab * kGramTile * 2;
constexpr size_t kGramShared = size_t{kGramStages} * 2 * kSlabBytes;

constexpr int kTokensPerRun = 32;  // that the accumulators of a tensor core may see

struct GramOperand {  // (parts, tokens, dim), rows and parts at multiples of 16 bytes
  const void* data;
  int64_t stride, part_stride;
  const uint32_t* nonzero;  // (parts - 1, column tiles): whether a part has anything there
  int dim, parts;
  int first_column;  // of the joint columns
};

struct GramProblem {  // the tokens of one layer
  GramOperand inputs[kMaxInputs];
  int num_inputs;
  int64_t tokens;
  double* out[kMaxProducts];  // (rows, cols), contiguous; null: left out
  const double* sums;         // of the joint columns, over all tokens of the update
  const float* shifts;        // likewise; null: no shift, or put right by another launch
  double count;
};

struct GramParams {
  GramProblem problems[kMaxGramProblems];
  int num_problems;
  int tiles, splits;
  int64_t split_tokens;
  float* partial;  // (tiles, splits, 128, 128) where splits > 1
};

// ---- Tiles -------------------------------------------------------------------------------------

NBL_HOST_DEVICE inline int gram_products(int num_inputs) { return 2 * num_inputs - 1; }
NBL_HOST_DEVICE inline int gram_row_input(int product) { return (product + 1) / 2; }
NBL_HOST_DEVICE inline int gram_col_input(int product) { return product % 2 ? 0 : product / 2; }
NBL_HOST_DEVICE inline bool gram_symmetric(int product) { return product % 2 == 0; }
NBL_HOST_DEVICE inline int column_tiles(int64_t dim) {
  return static_cast<int>((dim + kGramTile - 1) / kGramTile);
}

struct GramBand {     // of one product's tiles
  int height, right;  // rows; columns right of the triangle (all of them where there is none)
  int triangle;       // tiles at or above the diagonal among the band's first columns
};

NBL_HOST_DEVICE inline GramBand gram_band(int rows, int cols, bool symmetric, int first_row) {
  const int height = rows - first_row < kGramBand ? rows - first_row : kGramBand;
  if (!symmetric) return {height, cols, 0};
  return {height, cols - first_row - height, height * (height + 1) / 2};
}

NBL_HOST_DEVICE inline int gram_tiles(const GramProblem& problem, int product) {
  const bool symmetric = gram_symmetric(product);
  const int rows = column_tiles(problem.inputs[gram_row_input(product)].dim);
  const int cols = column_tiles(problem.inputs[gram_col_input(product)].dim);
  if (problem.tokens == 0 || !problem.out[product]) return 0;
  return symmetric ? rows * (rows + 1) / 2 : rows * cols;
}

struct GramTile {
  int problem, product, row, col;  // in tiles
};

// The tile number `index` of all those of a launch.
NBL_HOST_DEVICE inline GramTile gram_tile(const GramParams& p, int index) {
  GramTile tile{0, 0, 0, 0};
  for (int tiles; index >= (tiles = gram_tiles(p.problems[tile.problem], tile.product));) {
    index -= tiles;
    if (++tile.product < gram_products(p.problems[tile.problem].num_inputs)) continue;
    tile.product = 0;
    ++tile.problem;
  }
  const GramProblem& problem = p.problems[tile.problem];
  const bool symmetric = gram_symmetric(tile.product);
  const int rows = column_tiles(problem.inputs[gram_row_input(tile.product)].dim);
  const int cols = column_tiles(problem.inputs[gram_col_input(tile.product)].dim);
  GramBand band = gram_band(rows, cols, symmetric, 0);
  while (index >= band.triangle + band.height * band.right) {
    index -= band.triangle + band.height * band.right;
    tile.row += kGramBand;
    band = gram_band(rows, cols, symmetric, tile.row);
  }
  if (index < band.triangle) {
    int column = 0;
    while (index > column) index -= ++column;
    tile.col = tile.row + column;
    tile.row += index;
  } else {
    index -= band.triangle;
    tile.col = (symmetric ? tile.row + band.height : 0) + index / band.height;
    tile.row += index % band.height;
  }
  return tile;
}

// Sets tiles, splits and split_tokens for the problems given.
NBL_HOST_DEVICE inline void plan_gram(GramParams& p, int sms) {
  int64_t tokens = 0;
  p.tiles = 0;
  for (int i = 0; i < p.num_problems; ++i) {
    const GramProblem& problem = p.problems[i];
    if (problem.tokens > tokens) tokens = problem.tokens;
    for (int product = 0; product < gram_products(problem.num_inputs); ++product)
      p.tiles += gram_tiles(problem, product);
  }
  const int64_t most = ceil_div(tokens, kSplitTokens);
  const int64_t wanted = p.tiles > 0 && p.tiles < sms ? sms / p.tiles : 1;
  p.split_tokens = ceil_div(ceil_div(tokens, wanted < most ? wanted : most), kSplitTokens);
  p.split_tokens *= kSplitTokens;
  p.splits = static_cast<int>(ceil_div(tokens, p.split_tokens));
}

// Workspace of the partial sums, where there are splits: the same for every span of an update, so
// that none runs out of memory after another was added.
inline size_t gram_partial_bytes(const GramParams& p, int sms) {
  const int64_t blocks = int64_t{p.tiles} * p.splits;
  return sizeof(float) * kGramTile * kGramTile * static_cast<size_t>(blocks < sms ? sms : blocks);
}

// ---- Work --------------------------------------------------------------------------------------

// What one block (or, in a persistent kernel, one turn of it) multiplies.
struct GramWork {
  GramTile tile;
  int64_t begin, end;   // tokens
  int pairs;            // of parts: the slabs are visited once for each
  uint32_t pair_codes;  // four bits to a pair: row part, 4 · column part; the smallest first
};

NBL_DEVICE int highest_part(const GramOperand& operand, int tile) {
  int part = operand.parts - 1;
  while (part > 0 && !operand.nonzero[(part - 1) * column_tiles(operand.dim) + tile]) --part;
  return part;
}

NBL_DEVICE GramWork gram_work(const GramParams& p, int index) {
  GramWork work;
  work.tile = gram_tile(p, index / p.splits);
  const GramProblem& problem = p.problems[work.tile.problem];
  work.begin = index % p.splits * p.split_tokens;
  work.end = work.begin + p.split_tokens;
  if (work.end > problem.tokens) work.end = problem.tokens;
  const int rows = highest_part(problem.inputs[gram_row_input(work.tile.product)], work.tile.row);
  const int cols = highest_part(problem.inputs[gram_col_input(work.tile.product)], work.tile.col);
  work.pairs = 0;
  work.pair_codes = 0;
  for (int order = 2; order >= 0; --order) {  // each part is 2^-9 of the one before, at most
    for (int part = 0; part <= order; ++part) {
      if (part > rows || order - part > cols) continue;
      work.pair_codes |= static_cast<uint32_t>(part | (order - part) << 2) << 4 * work.pairs++;
    }
  }
  return work;
}

// Slabs to visit, those of one pair of parts after those of another.
NBL_DEVICE int gram_steps(const GramWork& work, int slab) {
  if (work.begin >= work.end) return 0;
  return static_cast<int>((work.end - work.begin + slab - 1) / slab) * work.pairs;
}

// ---- Results -----------------------------------------------------------------------------------

struct GramOutput {  // one Gram matrix, and how to put its shifts right
  double* out;
  int rows, cols;
  bool upper;
  double count;
  const double *row_sums, *col_sums;
  const float *row_shifts, *col_shifts;  // null: nothing to put right

  NBL_HOST_DEVICE bool has(int row, int col) const {
    return row < rows && col < cols && (!upper || row <= col);
  }
  NBL_HOST_DEVICE int64_t at(int row, int col) const { return int64_t{row} * cols + col; }
  NBL_HOST_DEVICE double shifted_part(int row, int col) const {
    if (!row_shifts) return 0.0;
    const double row_shift = row_shifts[row], col_shift = col_shifts[col];
    return (row_sums[row] - count * row_shift) * col_shift + row_shift * col_sums[col];
  }
};

NBL_HOST_DEVICE inline GramOutput gram_output(const GramProblem& problem, int product) {
  const GramOperand& rows = problem.inputs[gram_row_input(product)];
  const GramOperand& cols = problem.inputs[gram_col_input(product)];
  GramOutput output{problem.out[product], rows.dim, cols.dim, gram_symmetric(product),
                    problem.count};
  output.row_sums = problem.sums + rows.first_column;
  output.col_sums = problem.sums + cols.first_column;
  output.row_shifts = problem.shifts ? problem.shifts + rows.first_column : nullptr;
  output.col_shifts = problem.shifts ? problem.shifts + cols.first_column : nullptr;
  return output;
}

// Hands over fragments of a tile, sums[m][n] the 16 x 8 ones (layout: ptx.cuh) at row first_row +
// 16 m, column first_col + 8 n: to the float64 matrix, or to the workspace of a split.
template <int kM, int kN>
NBL_DEVICE void finish_fragments(const GramParams& p, int index, const GramTile& tile,
                                 int first_row, int first_col, const float (&sums)[kM][kN][4]) {
  const int lane = threadIdx.x % 32;
  first_row += lane / 4;
  first_col += lane % 4 * 2;
  if (p.splits > 1) {
    float* partial = p.partial + int64_t{index} * kGramTile * kGramTile;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[(first_row + 16 * m + i / 2 * 8) * kGramTile + first_col + 8 * n + i % 2] =
              sums[m][n][i];
    return;
  }
  const GramOutput g = gram_output(p.problems[tile.problem], tile.product);
  first_row += tile.row * kGramTile;
  first_col += tile.col * kGramTile;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      double before[4][4];  // 16 loads in flight
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int row = first_row + 16 * m + e % 4 / 2 * 8;
        const int col = first_col + 8 * (n + e / 4) + e % 2;
        before[e / 4][e % 4] = g.has(row, col) ? g.out[g.at(row, col)] : 0.0;
      }
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int row = first_row + 16 * m + e % 4 / 2 * 8;
        const int col = first_col + 8 * (n + e / 4) + e % 2;
        if (g.has(row, col))
          g.out[g.at(row, col)] =
              before[e / 4][e % 4] + (sums[m][n + e / 4][e % 4] + g.shifted_part(row, col));
      }
    }
  }
}

// One block per tile: adds up the splits, in order.
static __global__ void __launch_bounds__(kGramThreads) gram_combine(NBL_PARAM GramParams p) {
  const GramTile tile = gram_tile(p, blockIdx.x);
  const GramOutput g = gram_output(p.problems[tile.problem], tile.product);
  const float* partial = p.partial + int64_t{blockIdx.x} * p.splits * kGramTile * kGramTile;
  for (int i = threadIdx.x; i < kGramTile * kGramTile; i += kGramThreads) {
    const int row = tile.row * kGramTile + i / kGramTile;
    const int col = tile.col * kGramTile + i % kGramTile;
    if (!g.has(row, col)) continue;
    double sum = 0;
    for (int split = 0; split < p.splits; ++split)
      sum += partial[int64_t{split} * kGramTile * kGramTile + i];
    g.out[g.at(row, col)] += sum + g.shifted_part(row, col);
  }
}

// ---- The portable kernel -----------------------------------------------------------------------

// Where the 16-byte chunk `chunk` of token `token` lies in a slab.
NBL_DEVICE int slab_offset(int token, int chunk) {
  return token * kGramTile * 2 + (chunk ^ token % 8) * 16;
}

// One warp's 64 x 32 of a slab: accumulators[m][n] += rowsᵀ cols.
template <class T>
NBL_DEVICE void multiply_slab(float (&accumulators)[4][4][4], const char* rows, const char* cols,
                              int first_row, int first_col) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, in_matrix = lane % 8;
#pragma unroll
  for (int k = 0; k < kGramSlab; k += 16) {
    uint32_t a[4][4], b[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m)
      load_matrix_x4_transposed(a[m], rows + slab_offset(k + matrix / 2 * 8 + in_matrix,
                                                         first_row / 8 + 2 * m + matrix % 2));
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t both[4];
      load_matrix_x4_transposed(
          both, cols + slab_offset(k + matrix % 2 * 8 + in_matrix, first_col / 8 + n + matrix / 2));
      b[n][0] = both[0];
      b[n][1] = both[1];
      b[n + 1][0] = both[2];
      b[n + 1][1] = both[3];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_m16n8k16<T>(accumulators[m][n], a[m], b[n]);
  }
}

// Fetches slab after slab of both operands: thread i the chunk i mod 16 of the tokens i / 16 and
// i / 16 + 16.
template <class T>
struct SlabLoader {
  const T *rows, *cols;  // this thread's columns, token 0, part 0
  int64_t row_stride, col_stride, row_part, col_part;
  bool in_rows, in_cols;  // whether those columns exist
  int64_t begin, end;
  int64_t token;  // of the next slab
  int pairs;      // not yet through
  uint32_t codes;

  NBL_DEVICE SlabLoader(const GramProblem& problem, const GramWork& work)
      : begin(work.begin),
        end(work.end),
        token(work.begin),
        pairs(work.begin < work.end ? work.pairs : 0),
        codes(work.pair_codes) {
    const GramOperand& r = problem.inputs[gram_row_input(work.tile.product)];
    const GramOperand& c = problem.inputs[gram_col_input(work.tile.product)];
    const int chunk = threadIdx.x % 16 * 8;
    const int row = work.tile.row * kGramTile + chunk, col = work.tile.col * kGramTile + chunk;
    in_rows = row < r.dim;
    in_cols = col < c.dim;
    rows = static_cast<const T*>(r.data) + (in_rows ? row : 0);
    cols = static_cast<const T*>(c.data) + (in_cols ? col : 0);
    row_stride = r.stride;
    col_stride = c.stride;
    row_part = r.part_stride;
    col_part = c.part_stride;
  }

  NBL_DEVICE void load_next(char* stage) {
    if (pairs > 0) {
      const T* from_rows = rows + static_cast<int>(codes & 3) * row_part;
      const T* from_cols = cols + static_cast<int>(codes >> 2 & 3) * col_part;
      const int chunk = threadIdx.x % 16, first = threadIdx.x / 16;
#pragma unroll
      for (int i = first; i < kGramSlab + first; i += kGramThreads / 16) {
        const int64_t t = token + i;
        const bool valid = t < end;
        const int64_t source = valid ? t : token;
        char* to = stage + slab_offset(i, chunk);
        copy_async_16(to, from_rows + source * row_stride, valid && in_rows);
        copy_async_16(to + kSlabBytes, from_cols + source * col_stride, valid && in_cols);
      }
      token += kGramSlab;
      if (token >= end) {
        token = begin;
        --pairs;
        codes >>= 4;
      }
    }
    copy_async_commit();
  }
};

// One block per (tile, split).
template <class T>
__global__ void __launch_bounds__(kGramThreads, 1) gram_portable(NBL_PARAM GramParams p) {
  const int index = blockIdx.x;
  const GramWork work = gram_work(p, index);
  const int steps = gram_steps(work, kGramSlab);
  static_assert(kTokensPerRun == kGramSlab, "a run is a slab");
  const int warp = threadIdx.x / 32;
  const int first_row = warp / 4 * 64, first_col = warp % 4 * 32;
  char* stages = shared_memory();

  SlabLoader<T> loader(p.problems[work.tile.problem], work);
  for (int s = 0; s < kGramStages - 1; ++s) loader.load_next(stages + s * 2 * kSlabBytes);

  float accumulators[4][4][4] = {}, sums[4][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kGramStages - 2>();
    sync_block();  // all have this step's slab, and are done with the one before
    loader.load_next(stages + (step + kGramStages - 1) % kGramStages * 2 * kSlabBytes);
    const char* stage = stages + step % kGramStages * 2 * kSlabBytes;
    multiply_slab<T>(accumulators, stage, stage + kSlabBytes, first_row, first_col);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      sums[i / 16][i / 4 % 4][i % 4] += accumulators[i / 16][i / 4 % 4][i % 4];
      accumulators[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }
  }
  finish_fragments(p, index, work.tile, first_row, first_col, sums);
}

NBL_HOST_DEVICE inline unsigned gram_blocks(const GramParams& p) {
  return static_cast<unsigned>(p.tiles) * static_cast<unsigned>(p.splits);
}

}  // namespace nbl
