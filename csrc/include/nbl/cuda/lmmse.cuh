// The steps of the LMMSE solves around their Cholesky factors and triangular solves (nbl/lmmse.h
// says what each computes). All are bound by reading and writing float64 once; each layer has its
// own blocks (blockIdx.z, or .y where there is one dimension).
//
//   equilibrate, check_pivots   one block per layer walks the diagonal
//   assemble                    32×32 tiles on and above the diagonal; the transposed tile of
//                               `cross` goes through shared memory, so that every access is a row
//        j →                                    crossᵀ[i][j] = cross[j][i]
//      i ┌──┬──┬──┐        cross ┌──┬──┬──┐
//      ↓ │ ◣│  │▓▓│              │  │  │  │     ▓ written, ▒ read by rows into shared memory,
//        └──┼──┼──┤              ├──┼──┼──┤       then read by columns
//           │ ◣│  │              │  │  │  │
//           └──┼──┤              ├──┼──┼──┤
//              │ ◣│              │▒▒│  │  │
//              └──┘              └──┴──┴──┘
//   scale                       32 columns × 8 rows per block, grid-stride over the rows
//   subtract_squares            two levels: a fixed number of blocks, then one block per layer
//
// Sums are added in an order that depends on the size alone: bit for bit the same on every run and
// every GPU.
#pragma once

#include "nbl/cuda/ptx.cuh"
#include "nbl/lmmse.h"

namespace nbl {

constexpr int kLmmseThreads = 256;
constexpr int kLmmseTile = 32;
constexpr int kLmmseTileRows = kLmmseThreads / kLmmseTile;  // rows of a tile in flight
constexpr int kLmmseTileStride = kLmmseTile + 1;            // columns fall on different banks

constexpr int kLmmseReduceBytes = kLmmseThreads / 32 * static_cast<int>(sizeof(double));

NBL_HOST_DEVICE constexpr int64_t lmmse_blocks(int64_t n, int64_t per_block, int64_t most) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

// Blocks per layer on the first level of subtract_squares: eight elements a thread, then more each.
NBL_HOST_DEVICE constexpr int squares_blocks(int64_t n) {
  return static_cast<int>(lmmse_blocks(n, kLmmseThreads * 8, 1024));
}

// ---- Launch geometry: for the launcher and for tests -------------------------------------------

#if !defined(__CUDACC_RTC__)

struct LmmseGrid {
  int x, y, z;
  int shared_bytes;
};

// One block per layer: equilibrate, check_pivots and the second level of subtract_squares.
inline LmmseGrid lmmse_layer_grid(int64_t layers) {
  return {1, static_cast<int>(layers), 1, kLmmseReduceBytes};
}

inline LmmseGrid assemble_grid(const SymmetricSum& c, int64_t layers) {
  const int tiles = static_cast<int>((c.n + kLmmseTile - 1) / kLmmseTile);
  const int bytes = kLmmseTile * kLmmseTileStride * static_cast<int>(sizeof(double));
  return {tiles, tiles, static_cast<int>(layers), c.cross ? bytes : 0};
}

inline LmmseGrid scale_grid(int64_t rows, int64_t cols, int64_t layers) {
  return {static_cast<int>((cols + kLmmseTile - 1) / kLmmseTile),
          static_cast<int>(lmmse_blocks(rows, kLmmseTileRows * 4, 1024)), static_cast<int>(layers),
          0};
}

inline LmmseGrid squares_grid(int64_t n, int64_t layers) {
  return {squares_blocks(n), static_cast<int>(layers), 1, kLmmseReduceBytes};
}

#endif  // __CUDACC_RTC__

// ---- Kernels -----------------------------------------------------------------------------------

// The sum over the block, in every thread. `shared` holds a double per warp.
NBL_DEVICE double block_sum(double value, double* shared) {
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) value += shuffle_xor(value, lane_mask);
  sync_block();  // what an earlier sum left has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  sync_block();
  double sum = 0;
  for (int warp = 0; warp < kLmmseThreads / 32; ++warp) sum += shared[warp];
  return sum;
}

NBL_DEVICE double diagonal_of(const SymmetricSum& c, int64_t layer, int64_t i) {
  const int64_t at = layer * c.n * c.n + i * (c.n + 1);
  return c.cross ? c.base[at] + c.other[at] + 2 * c.cross[at] : c.base[at];
}

NBL_DEVICE bool positive_and_finite(double value) { return value > 0 && value - value == 0; }

static __global__ void __launch_bounds__(kLmmseThreads)
    equilibrate_kernel(NBL_PARAM EquilibrateParams p) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int64_t layer = blockIdx.y;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.c.n; i += kLmmseThreads) sum += diagonal_of(p.c, layer, i);
  const double mean = block_sum(sum, shared) / static_cast<double>(p.c.n);
  const double lambda = p.ridge * (mean == 0 ? 1.0 : mean);
  for (int64_t i = threadIdx.x; i < p.c.n; i += kLmmseThreads)
    p.scale[layer * p.c.n + i] = 1 / sqrt(diagonal_of(p.c, layer, i) + lambda);
  if (threadIdx.x == 0) p.lambda[layer] = lambda;
}

static __global__ void __launch_bounds__(kLmmseThreads)
    assemble_kernel(NBL_PARAM AssembleParams p) {
  if (blockIdx.x < blockIdx.y) return;  // below the diagonal
  double* transposed = reinterpret_cast<double*>(shared_memory());
  const int64_t n = p.c.n, matrix = blockIdx.z * n * n;
  const int64_t first_row = int64_t{blockIdx.y} * kLmmseTile;
  const int64_t first_col = int64_t{blockIdx.x} * kLmmseTile;
  const int row = static_cast<int>(threadIdx.x) / kLmmseTile;
  const int col = static_cast<int>(threadIdx.x) % kLmmseTile;
  if (p.c.cross) {
    for (int r = row; r < kLmmseTile; r += kLmmseTileRows) {
      const int64_t j = first_col + r, i = first_row + col;
      if (j < n && i < n) transposed[r * kLmmseTileStride + col] = p.c.cross[matrix + j * n + i];
    }
    sync_block();
  }
  const double* scale = p.scale + blockIdx.z * n;
  for (int r = row; r < kLmmseTile; r += kLmmseTileRows) {
    const int64_t i = first_row + r, j = first_col + col;
    if (i >= n || j >= n || j < i) continue;
    const int64_t at = matrix + i * n + j;
    double value = p.c.base[at];
    if (p.c.cross) value += p.c.other[at] + p.c.cross[at] + transposed[col * kLmmseTileStride + r];
    p.out[at] = i == j ? 1.0 : value * scale[i] * scale[j];
  }
}

static __global__ void __launch_bounds__(kLmmseThreads)
    check_pivots_kernel(NBL_PARAM CheckPivotsParams p) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int64_t layer = blockIdx.y;
  double failures = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += kLmmseThreads) {
    const double root = p.factor[layer * p.n * p.n + i * (p.n + 1)];
    const bool ok = positive_and_finite(p.scale[layer * p.n + i]) &&
                    root * root > p.smallest_pivot;  // false for NaN, too
    failures += ok ? 0 : 1;
  }
  const bool ok = block_sum(failures, shared) == 0 && p.info[layer] == 0;
  if (threadIdx.x == 0) p.used[layer] = ok ? p.ridge : p.failed;
}

static __global__ void __launch_bounds__(kLmmseThreads) scale_kernel(NBL_PARAM ScaleParams p) {
  const int64_t j = int64_t{blockIdx.x} * kLmmseTile + threadIdx.x % kLmmseTile;
  if (j >= p.cols) return;
  const int64_t layer = blockIdx.z;
  const double col_scale = p.col_scale[layer * p.cols + j];
  const int64_t stride = int64_t{gridDim.y} * kLmmseTileRows;
  for (int64_t i = int64_t{blockIdx.y} * kLmmseTileRows + threadIdx.x / kLmmseTile; i < p.rows;
       i += stride) {
    const int64_t at = (layer * p.rows + i) * p.cols + j;
    const double value = p.b ? p.a[at] + p.b[at] : p.a[at];
    const double scaled = value * col_scale;
    p.out[at] = p.row_scale ? scaled * p.row_scale[layer * p.rows + i] : scaled;
  }
}

static __global__ void __launch_bounds__(kLmmseThreads)
    squares_kernel(NBL_PARAM SubtractSquaresParams p) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const double* a = p.a + blockIdx.y * p.n;
  const int64_t stride = int64_t{gridDim.x} * kLmmseThreads;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kLmmseThreads + threadIdx.x; i < p.n; i += stride)
    sum += a[i] * a[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) p.partial[blockIdx.y * int64_t{gridDim.x} + blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(kLmmseThreads)
    subtract_squares_kernel(NBL_PARAM SubtractSquaresParams p) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int64_t layer = blockIdx.y;
  const int blocks = squares_blocks(p.n);
  double sum = 0;
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kLmmseThreads)
    sum += p.partial[layer * blocks + b];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) p.out[layer] -= p.factor ? p.factor[layer] * sum : sum;
}

}  // namespace nbl
