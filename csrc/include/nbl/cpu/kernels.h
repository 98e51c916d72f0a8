// The parameters of the CPU kernels, and one table of entry points per instruction set.
//
// Raw pointers and sizes only: no torch, no Python. Row strides are in elements; the last dimension
// is contiguous. Work is given as a range [begin, end) so that any thread pool can split it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "../memory.h"
#include "../rope.h"

namespace nbl {

constexpr int64_t kSkinnyRows = 16;  // rows of x that the skinny kernels take
constexpr int64_t kWideRows = 512;   // and the wide ones, at a time

// Channels that memory_filter takes through the tokens together.
constexpr int64_t kMemoryGroup = 64;
inline int64_t memory_groups(int64_t channels) {
  return (channels + kMemoryGroup - 1) / kMemoryGroup;
}

struct SkinnyLinear {
  const void* x;  // (m, k), m <= kSkinnyRows, or kWideRows
  int64_t x_stride;
  const void* norm_weight;  // (k), or null: no normalization
  float norm_eps;
  const void* weight;        // (n, k); (2n, k) for swiglu: n gate rows, then n up rows
  int64_t weight_stride;     // int4: in bytes
  const void* weight_scale;  // float (n), bfloat16 (n, groups) for int4; null for kPlain
  const void* bias;          // (n) or null
  const void* residual;      // (m, n) or null
  int64_t residual_stride;
  void* out;  // (m, n)
  int64_t out_stride;
  int64_t m, n, k;
};

struct RowNorm {
  const void* x;  // (rows, k)
  int64_t x_stride;
  const void* norm_weight;  // (k)
  float norm_eps;
  void* out;  // (rows, k), contiguous
  int64_t k;
};

struct SiluMul {
  const void* gate_up;  // (rows, 2n), contiguous
  void* out;            // (rows, n), contiguous
  int64_t n;
};

struct ResidualRows {
  const void* residual;  // (rows, n)
  int64_t residual_stride;
  const void* bias;  // (n) or null
  void* out;         // (rows, n), contiguous, = residual + bias
  int64_t n;
};

// One input of a Gram update: a column range of the joint matrix [features | targets | block].
struct GramInput {
  const void* data;  // (tokens, dim)
  int64_t stride;
  int64_t dim;
  int64_t
      first_panel;  // its columns in the packed chunk; the last panel of an input is zero-padded
};

// A chunk of tokens, packed for the products: [block of tokens][panel of columns][token][column],
// tokens in interleaved pairs where `pairs`. One more panel at the end holds ones for the tokens
// that count: its products with the other panels are the column sums.
struct GramChunk {
  GramInput inputs[3];
  int num_inputs;
  const int64_t* tokens;  // row numbers of the tokens of this chunk
  int64_t num_tokens;
  int64_t block_tokens, num_blocks;
  int64_t num_panels;
  bool pairs;
  void* packed;
  const float* shifts;  // per packed column: what is subtracted before multiplying
  bool shifted;         // whether any shift is not zero
  uint8_t* inexact;     // per token: x - shift was no bf16 number, the token was left out (pairs)
  const double* sums;   // per packed column: Σ (x - shift) over the tokens counted
  double count;         // tokens counted
};

// out += Σ row column^T over the chunk, for two inputs (or the ones) of the joint matrix.
struct GramJob {
  int64_t row_panel, rows;  // first packed panel and number of columns taken as rows of `out`
  int64_t col_panel, cols;
  double* out;
  int64_t stride;
  bool upper;     // rows == cols: only tiles that touch the upper triangle
  bool recenter;  // add what the shifts took away: S sᵀ + s (S + n s)ᵀ
  int64_t row_tiles, col_tiles;
};

// The kernels for one type of activations and one format of weights.
struct LinearKernels {
  void (*prepare_features)(const SkinnyLinear&, void* features, int64_t begin, int64_t end);
  void (*linear_columns)(const SkinnyLinear&, const void* features, int64_t begin, int64_t end);
  void (*swiglu_columns)(const SkinnyLinear&, const void* features, int64_t begin, int64_t end);
  // For many rows, with the features of kPlain and scratch memory of each thread's own.
  void (*wide_linear_columns)(const SkinnyLinear&, const void* features, void* scratch,
                              int64_t begin, int64_t end);
  void (*wide_swiglu_columns)(const SkinnyLinear&, const void* features, void* scratch,
                              int64_t begin, int64_t end);
  int64_t (*wide_scratch_bytes)(int64_t m, int64_t k);
};

// The kernels for one element type.
struct TypedKernels {
  LinearKernels linears[4];  // by WeightFormat
  void (*rms_norm_rows)(const RowNorm&, int64_t begin, int64_t end);
  void (*silu_mul_rows)(const SiluMul&, int64_t begin, int64_t end);
  void (*residual_rows)(const ResidualRows&, int64_t begin, int64_t end);
  void (*rope_append)(const RopeParams&, int64_t begin, int64_t end);      // tokens
  void (*memory_filter)(const MemoryParams&, int64_t begin, int64_t end);  // groups of channels
  void (*column_stats)(const GramInput&, const int64_t* tokens, int64_t count, float* sums,
                       float* squares);  // += Σ x, Σ x² per column
  void (*pack)(const GramChunk&, int64_t block);

  const LinearKernels& operator[](WeightFormat format) const {
    return linears[static_cast<int>(format)];
  }
};

struct CpuKernels {
  const char* name;
  TypedKernels float32, bfloat16, float16;
  void (*gram_tile)(const GramChunk&, const GramJob&, int64_t tile, double* tile_sums);
  int64_t panel;            // columns per packed panel
  int64_t tile_row_panels;  // panels per tile of a GramJob
  int64_t tile_col_panels;
  int64_t block_tokens;  // tokens per packed block: what float32 may sum up before float64 does
  int64_t block_tokens_pairs;
  bool bfloat16_pairs;  // bf16 is multiplied in pairs of tokens, without conversion

  const TypedKernels& operator[](DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kBFloat16 ? bfloat16 : float16;
  }
};

// In csrc/cpu/kernels_<isa>.cpp.
const CpuKernels& kernels_portable();
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();
const CpuKernels& kernels_avx512_bf16();

}  // namespace nbl
